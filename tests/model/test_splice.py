import torch
from hypothesis import given
from hypothesis import strategies as st

from vico_pl.model.vlm import splice

WIDTH = 3
PLACEHOLDER, TEXT, RESPONSE = "#", "t", "r"
samples_of_tokens = st.lists(
    st.lists(st.sampled_from([PLACEHOLDER, TEXT, TEXT, RESPONSE]), max_size=12).map(
        lambda tokens: [TEXT, *tokens]
    ),
    min_size=1,
    max_size=4,
)


def rows(count, *, start):
    """Vectors that are all different: row i is (start + i, start + i, ...)."""
    return (torch.arange(float(count)) + start)[:, None].expand(count, WIDTH)


def run_splice(samples, counts):
    tokens = [token for sample in samples for token in sample]
    return splice(
        rows(len(tokens), start=1000),
        rows(sum(counts), start=0),
        torch.tensor(counts, dtype=torch.int64),
        is_placeholder=torch.tensor([token == PLACEHOLDER for token in tokens]),
        response_mask=torch.tensor([token == RESPONSE for token in tokens]),
        sample_lengths=torch.tensor([len(sample) for sample in samples]),
    )


def naive_splice(samples, counts):
    """The same, one token after the other: values, lengths, places of response tokens."""
    values, lengths, responses = [], [], []
    text, vision, tiles = 1000, 0, iter(counts)
    for sample in samples:
        begin = len(values)
        for token in sample:
            if token == PLACEHOLDER:
                count = next(tiles)
                values += range(vision, vision + count)
                vision += count
            else:
                if token == RESPONSE:
                    responses.append(len(values))
                values.append(text)
            text += 1
        lengths.append(len(values) - begin)
    return values, lengths, responses


def test_the_worked_example():
    spliced = run_splice([[TEXT, PLACEHOLDER, RESPONSE]], [4])  # a # b -> a v v v v b
    assert spliced.embeddings[:, 0].tolist() == [1000, 0, 1, 2, 3, 1002]
    assert spliced.segment_lengths == [6]
    assert spliced.response_positions.tolist() == [4]  # the last vision token predicts b


def test_samples_of_text_alone_and_of_several_images():
    samples = [[TEXT, RESPONSE], [TEXT, PLACEHOLDER, PLACEHOLDER, TEXT, PLACEHOLDER, RESPONSE, RESPONSE]]
    spliced = run_splice(samples, [2, 1, 3])
    assert spliced.embeddings[:, 0].tolist() == [1000, 1001, 1002, 0, 1, 2, 1005, 3, 4, 5, 1007, 1008]
    assert spliced.segment_lengths == [2, 10]
    assert spliced.response_positions.tolist() == [0, 9, 10]


@given(samples=samples_of_tokens, data=st.data())
def test_it_equals_splicing_one_token_after_the_other(samples, data):
    num_tiles = sum(sample.count(PLACEHOLDER) for sample in samples)
    counts = data.draw(st.lists(st.sampled_from([1, 4, 5]), min_size=num_tiles, max_size=num_tiles))
    values, lengths, responses = naive_splice(samples, counts)
    spliced = run_splice(samples, counts)
    assert spliced.embeddings[:, 0].tolist() == values
    assert spliced.segment_lengths == lengths
    assert spliced.response_positions.tolist() == [place - 1 for place in responses]


def test_gradients_reach_text_and_vision_tokens_each_once():
    text, vision = torch.zeros(3, WIDTH, requires_grad=True), torch.zeros(4, WIDTH, requires_grad=True)
    spliced = splice(
        text,
        vision,
        torch.tensor([4]),
        is_placeholder=torch.tensor([False, True, False]),
        response_mask=torch.tensor([False, False, True]),
        sample_lengths=torch.tensor([3]),
    )
    spliced.embeddings.sum().backward()
    assert torch.equal(vision.grad, torch.ones(4, WIDTH))
    assert torch.equal(text.grad, torch.tensor([1.0, 0.0, 1.0])[:, None].expand(3, WIDTH))
