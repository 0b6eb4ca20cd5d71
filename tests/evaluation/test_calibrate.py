import json

import numpy as np
import pytest
import torch

from tests.support.folders import router_probabilities, write_model_folder, write_set
from tests.support.tiny import encoded_image
from vico_pl.data.shards.reader import RecordReader, read_index
from vico_pl.evaluation.calibrate import (
    GROUP_SLACK,
    CalibrationPoint,
    Measured,
    calibrate,
    choose_point,
    find_promising,
    measure,
)
from vico_pl.evaluation.evaluate import evaluate
from vico_pl.evaluation.questions import Measure, open_questions
from vico_pl.files import write_json
from vico_pl.inference.predictor import Predictor
from vico_pl.model.families.base import CALIBRATION_NAME
from vico_pl.model.router import NEVER, RoutingRule


def point(threshold, fraction, *, mean=1.0, ocr=None, accuracy=None, low=None, bound=None):
    kept = {"perception": mean, "reasoning": None, "ocr": mean if ocr is None else ocr, "mean": mean}
    kept["overall"] = 0.0  # does not count
    right = {skill: accuracy if accuracy is not None else value for skill, value in kept.items()}
    low = mean if low is None else low
    intervals = {**dict.fromkeys(kept), "mean": [low, 1.0]}
    tables = {"accuracy": right, "retention": kept, "retention_ci": intervals}
    rest = {"num_images": 100, "num_questions": 300, "retention_bound": low if bound is None else bound}
    return CalibrationPoint(threshold=threshold, token_fraction=fraction, **rest, **tables)


FULL = point(NEVER, 1.0)


def chosen(*points, retention=0.99, budget=None):
    return choose_point([FULL, *points], retention=retention, budget=budget).threshold


def test_the_cheapest_point_that_keeps_the_accuracy_is_chosen():
    curve = [point(0.9, 0.8, mean=1.0), point(0.5, 0.5, mean=0.991), point(0.2, 0.3, mean=0.981)]
    assert chosen(*curve) == 0.5
    assert chosen(*reversed(curve)) == 0.5
    assert chosen(*curve, retention=0.98) == 0.2
    assert chosen(*curve, retention=0.995) == 0.9


def test_the_bound_must_keep_the_accuracy_and_more_images_may_raise_it():
    safe, promising = point(0.5, 0.5, mean=0.997, low=0.991), point(0.2, 0.3, mean=0.994, low=0.986)
    curve = [FULL, safe, promising, point(0.1, 0.25, mean=0.98)]
    assert choose_point(curve, retention=0.99) == safe
    # Half the width of the interval, for which four times as many images are needed.
    found = find_promising(curve, safe, retention=0.99)
    assert found == {"threshold": 0.2, "token_fraction": 0.3, "images_needed": pytest.approx(400, abs=1)}
    assert find_promising([FULL, safe], safe, retention=0.99) is None
    assert choose_point([FULL, promising], retention=0.99) == FULL


def test_a_cheaper_point_that_keeps_the_accuracy_does_not_count_below_one_that_fails():
    lucky = point(0.2, 0.3, mean=1.0)
    curve = [point(0.9, 0.8), point(0.5, 0.5, mean=0.98), lucky]
    assert chosen(*curve) == 0.9
    assert find_promising([FULL, *curve], curve[0], retention=0.99) is None
    # Neither does the number of images that the lucky one needs: those above it need more.
    narrow, wide = point(0.3, 0.4, mean=0.996, low=0.992), point(0.5, 0.5, mean=0.994, low=0.986)
    found = find_promising([FULL, wide, narrow], FULL, retention=0.99)
    assert found["threshold"] == 0.3
    assert found["images_needed"] == pytest.approx(400, abs=1)
    hopeless = point(0.4, 0.45, mean=0.9901, low=0.986)
    found = find_promising([FULL, wide, hopeless, narrow], FULL, retention=0.99)
    assert found["threshold"] == 0.5


@pytest.mark.parametrize(
    ("mean", "low", "bound"), [(0.997, 0.98, 0.98), (0.997, 0.985, 0.97), (1.0, 1.0, 0.963)]
)
def test_with_as_many_images_as_are_said_to_be_needed_the_point_is_chosen(mean, low, bound):
    tried = point(0.5, 0.5, mean=mean, low=low, bound=bound)
    assert chosen(tried) == NEVER
    more = find_promising([FULL, tried], FULL, retention=0.99)["images_needed"] / tried.num_images
    for share, threshold in {1.01: 0.5, 0.97: NEVER}.items():
        end = mean - (mean - low) / (share * more) ** 0.5
        assert chosen(point(0.5, 0.5, mean=mean, bound=end - (low - bound) / (share * more))) == threshold


def test_few_images_show_little_even_if_nothing_is_lost():
    """It takes 738 images without fault to be sure of 99.5 %: 0.995 ** 738 is 2.5 %."""
    for number, is_enough in ((60, False), (650, False), (850, True)):
        scores = np.ones((2, number))
        measured = Measured(
            thresholds=[NEVER, 0.5],
            tokens=np.repeat([[4], [1]], number, axis=1),
            images=np.arange(number),
            groups=np.full(number, "ocr"),
            scores=scores,
        )
        curve = measured.curve()
        assert (choose_point(curve, retention=0.995).threshold == 0.5) == is_enough
        if not is_enough:
            found = find_promising(curve, curve[0], retention=0.995)
            assert found["images_needed"] == pytest.approx(738, rel=0.05)


def test_one_skill_may_fall_a_little_below_the_mean_but_not_far_else_full_tokens_are_kept():
    assert chosen(point(0.5, 0.5, mean=0.991, ocr=0.99 - 0.9 * GROUP_SLACK)) == 0.5
    assert chosen(point(0.5, 0.5, mean=0.991, ocr=0.99 - 1.1 * GROUP_SLACK)) == NEVER
    assert chosen(point(0.9, 0.8, mean=0.9), point(0.0, 0.25, mean=0.1)) == NEVER


def test_within_a_budget_the_most_accurate_point_is_chosen_and_of_equals_the_cheapest():
    costs = ((0.9, 0.8, 0.95), (0.6, 0.5, 0.9), (0.5, 0.45, 0.9), (0.0, 0.25, 0.5))
    curve = [point(threshold, fraction, accuracy=right) for threshold, fraction, right in costs]
    assert chosen(*curve, budget=0.5) == 0.5
    assert chosen(*curve, budget=0.8) == 0.9
    assert chosen(*curve, budget=0.25) == 0.0
    assert chosen(*curve, budget=1.0, retention=0.1) == NEVER  # the budget alone counts


def test_a_budget_that_cannot_be_met_is_refused(predictor, answered):
    assert calibrate(open_questions(predictor, answered), retention=1.0, budget=0.25)[0].threshold == 0.0
    with pytest.raises(ValueError, match=r"budget 0\.2 cannot be met: all tiles compressed cost 0\.25"):
        calibrate(open_questions(predictor, answered), retention=1.0, budget=0.2)


@pytest.fixture(scope="module")
def curve(model_folder, answered):
    return measure(open_questions(Predictor.load(model_folder), answered)).curve()


def test_the_curve_goes_from_full_tokens_to_all_tiles_compressed(curve, model_folder, answered):
    fractions = [p.token_fraction for p in curve]
    assert (fractions[0], fractions[-1]) == (1.0, 0.25)
    assert fractions == sorted(set(fractions), reverse=True)
    assert (curve[0].threshold, curve[-1].threshold) == (NEVER, 0.0)
    thresholds = [p.threshold for p in curve]
    assert thresholds == sorted(set(thresholds), reverse=True)
    assert len(curve) >= 10
    probabilities = router_probabilities(Predictor.load(model_folder), answered)
    for p in curve:
        assert p.token_fraction == pytest.approx(1 - 0.75 * (probabilities >= p.threshold).mean())


def test_a_model_that_answers_itself_is_right_at_full_tokens_and_less_so_below(curve):
    names = ("ocr", "perception", "reasoning", "mean", "overall")
    assert curve[0].accuracy == dict.fromkeys(names, 1.0)
    assert curve[-1].accuracy["mean"] < 0.8
    for p in curve:
        assert p.retention == p.accuracy  # as the full accuracy is 1
    assert len({p.accuracy["mean"] for p in curve}) > 4


def test_retention_is_relative_to_full_tokens(predictor, answered, tmp_path):
    """With one of two answers expected wrongly, what is kept of the other still counts in full."""
    index = read_index(answered)
    records = []
    for original in map(RecordReader(index), range(index.num_samples)):
        annotation = json.loads(bytes(original.files["json"]))
        if annotation["skills"]:
            wrong = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "no: zz"}]
            turns = {"conversations": annotation["conversations"][:2] + wrong, "skills": ["ocr", "ocr"]}
            files = {"png": bytes(original.files["png"]), "json": json.dumps(turns).encode()}
            records.append((original.key, files))
    curve = measure(open_questions(predictor, write_set(tmp_path / "half", records))).curve()
    assert curve[0].accuracy["mean"] == 0.5
    assert curve[0].retention == {"ocr": 1.0, "mean": 1.0, "overall": 1.0}
    for p in curve:
        assert p.retention["ocr"] == pytest.approx(2 * p.accuracy["ocr"], abs=2e-6)


@torch.no_grad()
def test_a_session_reads_the_choice_back_and_spends_what_was_promised(predictor, answered, curve, tmp_path):
    folder = write_model_folder(tmp_path / "model")
    chosen, record = calibrate(open_questions(predictor, answered), retention=0.8, budget=0.8)
    write_json(record, folder / CALIBRATION_NAME)
    session = Predictor.load(folder)
    assert session.rule == RoutingRule(threshold=chosen.threshold)
    stored = json.loads((folder / CALIBRATION_NAME).read_text())
    assert [p["threshold"] for p in stored["curve"]] == [p.threshold for p in curve]
    assert (stored["data"], stored["retention"], stored["budget"]) == (str(answered), 0.8, 0.8)
    tiles = [sample.tiles for sample in session.samples(answered)]
    ratios = torch.cat([session.choose_ratios(session.encode(of_sample)) for of_sample in tiles])
    assert (4 / ratios).mean().item() == pytest.approx(chosen.token_fraction)
    assert chosen.token_fraction < 0.8


def annotated(question, answer, *, skill=None):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"json": json.dumps({"conversations": turns, "skills": [skill]}).encode()}


@pytest.mark.parametrize(("answer", "agreement"), [("me", Measure.ANSWERS), ("", Measure.OWN)])
def test_a_set_without_metrics_is_calibrated_by_agreement(predictor, tmp_path, answer, agreement):
    pictures = [encoded_image("PNG", size=(64, 64), seed=i) for i in range(8)]
    records = [(f"{i}", {"png": p, **annotated("<image>", answer)}) for i, p in enumerate(pictures)]
    questions = open_questions(predictor, write_set(tmp_path / "set", records))
    kept = [point.retention_bound for point in measure(questions).curve()]
    wanted = sorted(kept)[-3]
    chosen, record = calibrate(questions, retention=wanted)
    assert record["measure"] == agreement
    assert kept[0] == 1 > wanted > kept[-1] > 0
    fractions = {p["token_fraction"] for p, low in zip(record["curve"], kept, strict=True) if low >= wanted}
    assert chosen.token_fraction == min(fractions) < 1
    low, high = chosen.retention_ci["mean"]
    assert low < chosen.retention["mean"] < high
    cheaper, _ = calibrate(questions, retention=1.0, budget=0.6)
    assert cheaper.token_fraction <= 0.6


def test_what_cannot_be_calibrated_is_refused(predictor, answered, tmp_path):
    text = write_set(tmp_path / "text", [("0", annotated("Who?", "me", skill="ocr"))])
    files = {"png": encoded_image("PNG", size=(64, 64)), **annotated("<image>\nWho?", "no: zz", skill="ocr")}
    wrong = write_set(tmp_path / "wrong", [(f"{i}", files) for i in range(4)])
    bare = Predictor.load(write_model_folder(tmp_path / "model", router_heads=None))
    for session, data, reason in (
        (predictor, text, "no image to calibrate or evaluate on"),
        (predictor, wrong, "wrong: 0 % right at full tokens"),
        (bare, answered, "has no router"),
    ):
        for budget in (None, 0.6):
            with pytest.raises(ValueError, match=reason):
                calibrate(open_questions(session, data), retention=0.9, budget=budget)


@pytest.mark.parametrize("run", [calibrate, evaluate])
def test_a_router_of_nan_is_refused(predictor, answered, run):
    with torch.no_grad():
        predictor.model.router.gating.gate[1].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="the router gives NaN or infinity"):
        run(open_questions(predictor, answered), **({"retention": 0.9} if run is calibrate else {"seed": 0}))


def test_tiles_that_the_router_cannot_tell_apart_give_a_curve_of_two_points(predictor, answered):
    gate = predictor.model.router.gating.gate[1]
    with torch.no_grad():
        gate.weight.zero_()
        gate.bias.zero_()
    curve = measure(open_questions(predictor, answered)).curve()
    assert [(p.threshold, p.token_fraction) for p in curve] == [(NEVER, 1.0), (0.0, 0.25)]
