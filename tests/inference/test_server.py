"""The server over real sockets: what clients get for good, bad, hostile and abandoned requests."""

import asyncio
import base64
import http.client
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch

pytest.importorskip("fastapi")  # vico_pl[serve]

import uvicorn

from tests.support.folders import write_model_folder
from tests.support.hostile import png
from tests.support.tiny import encoded_image
from vico_pl.inference.predictor import Predictor
from vico_pl.inference.protocol import ServeConfig
from vico_pl.inference.server import build_app

PHOTO = encoded_image("PNG", size=(64, 64))  # 2 x 2 tiles and a thumbnail
CHAT = "/v1/chat/completions"
ENDLESS = {"max_tokens": 400}  # a `slowed` model takes four seconds


class Client:
    """Talks to a server on this machine."""

    def __init__(self, port):
        self.port = port

    def request(self, method, path, body=None, headers=()):
        """Return status, headers and text of an answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request(method, path, body, dict(headers))
        answer = connection.getresponse()
        found = answer.status, dict(answer.headers), answer.read().decode()
        connection.close()
        return found

    def ask(self, body, **headers):
        """Return status and JSON of a chat request, whose body may be bytes."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        status, _, text = self.request("POST", CHAT, content, headers)
        assert "Traceback" not in text
        return status, json.loads(text)

    def wait_for(self, status):
        """Send requests without a body until one is answered with this status."""
        for _ in range(2000):
            answer = self.request("POST", CHAT, b"")
            if answer[0] == status:
                return answer
            time.sleep(0.005)
        return pytest.fail(f"the status is always {answer[0]}")

    def hang_up(self, body, *, after_bytes=0):
        """Send a chat request, and close the connection once the answer has so many bytes."""
        content = json.dumps(body).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", self.port), timeout=60) as connection:
            connection.sendall(head.encode() + content)
            received = b""
            while len(received) < after_bytes:
                received += connection.recv(4096)


@contextmanager
def serving(predictor, **settings):
    """Serve a model on a free port."""
    app = build_app(predictor, ServeConfig(model_name="tiny", **settings))
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning"))
    thread = threading.Thread(target=asyncio.run, args=(server.serve(),))
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield Client(server.servers[0].sockets[0].getsockname()[1])
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def routed(tmp_path_factory):
    """A calibrated predictor."""
    return Predictor.load(write_model_folder(tmp_path_factory.mktemp("serve") / "model", threshold=0.5))


@pytest.fixture(scope="module")
def endless(tmp_path_factory):
    """A predictor whose answers never end by themselves."""
    return Predictor.load(write_model_folder(tmp_path_factory.mktemp("serve") / "model", ends=False))


@pytest.fixture(scope="module")
def client(routed):
    with serving(routed, max_images=2, max_pixels=100_000, max_bytes=500_000, max_tokens=500) as found:
        yield found


@contextmanager
def slowed(predictor):
    """Let each step of the language model take 10 ms; yields a list with an entry for each."""
    steps = []
    hook = predictor.model.language.register_forward_pre_hook(lambda *_: steps.append(time.sleep(0.01)))
    yield steps
    hook.remove()


def url(content):
    return "data:image/png;base64," + base64.b64encode(content).decode()


def image_part(place):
    return {"type": "image_url", "image_url": {"url": place, "detail": "high"}}


def asking(text="What is A?", *, images=(), **fields):
    parts = [*map(image_part, images), {"type": "text", "text": text}]
    return {"model": "tiny", "messages": [{"role": "user", "content": parts}], **fields}


def saying(*messages):
    """A request of (role, content) each."""
    return {"model": "tiny", "messages": [{"role": role, "content": content} for role, content in messages]}


def stream_of(client, body):
    """Return the events of a stream, checked to end as OpenAI's do."""
    status, headers, text = client.request("POST", CHAT, json.dumps({**body, "stream": True}))
    assert (status, headers["content-type"].partition(";")[0]) == (200, "text/event-stream")
    *events, done, rest = text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


def test_an_answer_is_that_of_the_predictor_with_its_tokens_and_routing(client, routed):
    (expected,) = routed.generate([PHOTO], ["What is A?"], max_new_tokens=9)
    status, answer = client.ask(asking(images=[url(PHOTO)], max_tokens=9, logit_bias={"5": 1}))
    (choice,) = answer["choices"]
    assert (status, answer["object"], answer["model"]) == (200, "chat.completion", "tiny")
    assert choice["message"] == {"role": "assistant", "content": expected.text, "refusal": None}
    assert choice["finish_reason"] == expected.finish_reason
    (image,) = answer["routing"]
    assert (image["grid"], image["has_thumbnail"]) == ([2, 2], True)
    assert set(image["ratios"]) == {4, 16}
    spent = sum({4: 4, 16: 1}[ratio] for ratio in image["ratios"])  # of 5 tiles with 16 patches each
    prompt = len(routed.chat.encode_prompt(routed.prepare([PHOTO]).sample, "<image>\nWhat is A?").input_ids)
    assert answer["usage"] == {
        "prompt_tokens": prompt - 5 + spent,
        "completion_tokens": expected.new_tokens,
        "total_tokens": prompt - 5 + spent + expected.new_tokens,
        "vision_tokens": {"spent": spent, "saved": 20 - spent},
    }


def test_a_stream_gives_the_same_answer_in_pieces(endless):
    body = asking(images=[url(PHOTO)], max_tokens=12)
    with serving(endless) as client:
        whole = client.ask(body)[1]
        events = stream_of(client, {**body, "stream_options": {"include_usage": True}})
        assert len(stream_of(client, body)) == len(events) - 1, "usage only if it is asked for"
    first, *pieces, last, usage = events
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert len({event["id"] for event in events}) == 1
    assert (first["choices"][0]["delta"]["role"], first["routing"]) == ("assistant", whole["routing"])
    texts = [piece["choices"][0]["delta"]["content"] for piece in pieces]
    assert len(texts) > 3
    assert "".join(texts) == whole["choices"][0]["message"]["content"]
    assert (last["choices"][0]["delta"], last["choices"][0]["finish_reason"]) == ({}, "length")
    assert (usage["choices"], usage["usage"]) == ([], whole["usage"])


def test_conversations_several_images_and_text_alone_are_asked_as_written(client, routed):
    small = encoded_image("PNG", size=(32, 32), seed=3)
    turns = ["<image>\nWhat is A?", "red", "And here?\n<image>"]
    (expected,) = routed.generate([[PHOTO, small]], [turns], max_new_tokens=9)
    body = asking("And here?", images=[], max_completion_tokens=9)
    body["messages"][-1]["content"].append(image_part(url(small)))
    earlier = [*asking(images=[url(PHOTO)])["messages"], {"role": "assistant", "content": "red"}]
    _, answer = client.ask({**body, "messages": earlier + body["messages"]})
    assert answer["choices"][0]["message"]["content"] == expected.text
    assert [image["grid"] for image in answer["routing"]] == [list(i.grid) for i in expected.images]
    (expected,) = routed.generate(None, ["Who?"], max_new_tokens=9)
    status, answer = client.ask({**saying(("user", "Who?")), "max_tokens": 9})
    assert (status, answer["choices"][0]["message"]["content"]) == (200, expected.text)
    assert answer["usage"]["vision_tokens"] == {"spent": 0, "saved": 0}


def test_a_system_message_takes_the_place_of_the_models_own(client):
    plain = asking(max_tokens=1)
    system = saying(("system", "Be brief."), ("developer", "Or not."))["messages"]
    with_system = {**plain, "messages": system + plain["messages"]}
    tokens = [client.ask(body)[1]["usage"]["prompt_tokens"] for body in (plain, with_system, plain)]
    assert tokens[0] == tokens[2] < tokens[1] - len("Be brief.") // 4


def test_stop_ends_an_answer_before_its_text_also_in_a_stream(endless):
    (full,) = endless.generate(None, ["What is A?"], max_new_tokens=30)
    stop = full.text[6:9]
    body = asking(max_tokens=30, stop=stop)
    with serving(endless) as client:
        choice = client.ask(body)[1]["choices"][0]
        pieces = [event["choices"][0]["delta"].get("content", "") for event in stream_of(client, body)]
    expected = full.text[: full.text.index(stop)].strip()
    assert (choice["message"]["content"], choice["finish_reason"]) == (expected, "stop")
    assert "".join(pieces) == expected


def test_a_seed_makes_sampling_repeatable_and_the_default_is_greedy(endless):
    with serving(endless) as client:

        def text(**fields):
            return client.ask(asking(max_tokens=12, **fields))[1]["choices"][0]["message"]["content"]

        sampled = [text(temperature=1.5, seed=seed) for seed in (1, 1, 2)]
        assert sampled[0] == sampled[1] != sampled[2]
        assert text(temperature=0) == text() == text(temperature=1.5, top_p=1e-6) == text(temperature=1e-30)


def test_models_health_and_the_page_are_there_and_other_paths_are_not(client):
    assert json.loads(client.request("GET", "/health")[2]) == {"status": "ok"}
    (model,) = json.loads(client.request("GET", "/v1/models")[2])["data"]
    assert (model["id"], model["object"]) == ("tiny", "model")
    status, headers, page = client.request("GET", "/")
    assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert "//" not in page, "the page loads nothing from elsewhere"
    for method, path, code in (("GET", "/docs", 404), ("GET", "/openapi.json", 404), ("GET", CHAT, 405)):
        status, _, text = client.request(method, path)
        assert (status, json.loads(text)["error"]["type"]) == (code, "invalid_request_error")


BAD = [
    (b"{", 400, "Invalid JSON"),
    (b"", 400, "Invalid JSON"),
    (b"\xff\xfe", 400, "Invalid JSON"),
    (b"[" * 100_000, 400, "recursion limit"),
    (b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}', 400, "Invalid JSON"),
    ([], 400, "Input should be an object"),
    ({"model": "tiny"}, 400, "messages: Field required"),
    ({"model": "tiny", "messages": []}, 400, "at least 1"),
    (asking() | {"model": "gpt-4"}, 404, "no model 'gpt-4'; this server has 'tiny'"),
    (asking(temperature=2.1), 400, "temperature"),
    (asking(temperature="hot"), 400, "temperature: Input should be a valid number"),
    (asking(top_p=0), 400, "top_p"),
    (asking(n=2), 400, "n: Input should be 1"),
    (asking(seed=-1), 400, "seed"),
    (asking(stop=""), 400, "stop"),
    (asking(stop=list("abcde")), 400, "stop"),
    (asking(stop="a" * 1001), 400, "stop.0: String should have at most 1000 characters"),
    (asking(max_tokens=0), 400, "max_tokens"),
    (asking(max_completion_tokens=501), 400, "max_tokens is 501; expected at most 500"),
    (asking("<image>"), 400, "a text has <image>; expected images as parts"),
    (asking("a" * 150_000), 400, "150000 characters of text; the language model has 512 positions"),
    (saying(("system", "a" * 100_001), ("user", "b")), 400, "more than 100000 characters"),
    (saying(*[("user", "a")] * 1001), 400, "at most 1000 items"),
    (asking(images=[url(PHOTO)] * 3), 400, "at most 2"),
    (asking(images=["https://example.org/a.png"]), 400, "http and https URLs are not fetched"),
    (asking(images=["/etc/hostname"]), 400, "with --image-dir"),
    (asking(images=["data:image/png,abc"]), 400, "expected data:image"),
    *((asking(images=[f"data:image/png;base64,{text}"]), 400, "no base64") for text in ("@@@@", "abc", "é")),
    (asking(images=["data:image/png;base64,"]), 400, "image '0' (0 bytes)"),
    (asking(images=[url(b"no image")]), 400, "neither JPEG, PNG"),
    (asking(images=[url(PHOTO), url(PHOTO[:-60])]), 400, "image '1'"),
    (asking(images=[url(png(1000, 101))]), 400, "more than max_pixels (100000)"),
    (asking(images=[url(png(2**31 - 1, 2**31 - 1))]), 400, "image '0'"),
    (b"[" + b" " * 600_000, 413, "more than 500000 bytes"),
]


@pytest.mark.parametrize(("body", "status", "reason"), BAD, ids=[f"{row[1]} {row[2]}" for row in BAD])
def test_what_is_not_accepted_gets_a_sentence_in_openais_json(client, body, status, reason):
    found, answer = client.ask(body)
    assert found == status
    assert reason in answer["error"]["message"]
    assert answer["error"].keys() == {"message", "type", "param", "code"}
    assert "\n" not in answer["error"]["message"]


@pytest.mark.parametrize(
    "messages",
    [
        [("assistant", "a")],
        [("user", "a"), ("user", "b")],
        [("user", "a"), ("assistant", "b")],
        [("user", "a"), ("system", "b")],
        [("system", "a")],
        [("tool", "a")],
        [("user", None)],
        [("user", [{"type": "input_audio"}])],
        [("user", [{"type": "text"}])],
        [("system", [image_part(url(PHOTO))]), ("user", "a")],
    ],
)
def test_messages_out_of_order_or_of_other_kinds_are_refused(client, messages):
    status, answer = client.ask(saying(*messages))
    assert (status, answer["error"]["param"].partition(".")[0]) == (400, "messages")


def test_files_are_read_from_the_image_folder_alone(routed, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(PHOTO)
    (tmp_path / "secret.png").write_bytes(PHOTO)
    (tmp_path / "images" / "link.png").symlink_to(tmp_path / "secret.png")
    inside = tmp_path / "images" / "a.png"
    outside = ["../secret.png", "link.png", str(tmp_path / "secret.png"), "absent.png", ".", "\0", "a" * 300]
    with serving(routed, image_dir=tmp_path / "images", max_bytes=3 * len(PHOTO)) as client:
        assert client.ask(asking(images=["a.png"] * 3, max_tokens=1))[0] == 200
        assert "of at most 0 bytes" in client.ask(asking(images=["a.png"] * 4))[1]["error"]["message"]
        for place in ("a.png", str(inside), f"file://{inside}"):
            assert client.ask(asking(images=[place], max_tokens=1))[0] == 200
        for place in outside:
            status, answer = client.ask(asking(images=[place]))
            assert (status, answer["error"]["code"]) == (400, "invalid_image")
            assert str(tmp_path) not in answer["error"]["message"]


def test_with_a_key_only_its_owner_may_ask(routed):
    with serving(routed, api_key="secret") as client:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer secre\xe9"}):
            status, answer = client.ask(asking(), **headers)
            assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
            assert client.request("GET", "/v1/models", headers=headers)[0] == 401
        key = {"Authorization": "Bearer secret"}
        assert client.ask(asking(max_tokens=1), **key)[0] == 200
        assert client.ask(asking(), **key, **{"Sec-Fetch-Site": "cross-site"})[0] == 403
        assert client.request("GET", "/health")[0] == client.request("GET", "/")[0] == 200


def test_full_queues_send_clients_away_and_slow_answers_are_given_up(endless):
    settings = {"max_waiting": 2, "timeout_s": 0.6}
    with slowed(endless), serving(endless, **settings) as client, ThreadPoolExecutor(3) as pool:
        statuses = sorted(answer[0] for answer in pool.map(client.ask, [asking(**ENDLESS)] * 3))
        assert statuses == [503, 504, 504]
        *_, last = stream_of(client, asking(**ENDLESS))
        assert (last["error"]["type"], "--timeout" in last["error"]["message"]) == ("server_error", True)
        assert client.ask(asking(max_tokens=1))[0] == 200, "both are free again"


def test_a_full_queue_says_when_to_come_back_and_half_a_request_is_given_up(routed):
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n".encode()
    with serving(routed, max_waiting=1, timeout_s=2.0, max_tokens=5) as client:
        assert client.ask(asking())[1]["usage"]["completion_tokens"] <= 5, "no request need name a limit"
        with socket.create_connection(("127.0.0.1", client.port), timeout=60) as half:
            half.sendall(head)
            status, headers, _ = client.wait_for(503)
            assert (status, int(headers["retry-after"]) > 0) == (503, True)
            assert half.recv(12) == b"HTTP/1.1 504"
        assert client.wait_for(400)[0] == 400, "its place is free"


@pytest.mark.parametrize(("stream", "after_bytes"), [(False, 0), (True, 0), (True, 1500)])
def test_a_client_that_hangs_up_frees_its_place(endless, stream, after_bytes):
    with slowed(endless) as steps, serving(endless, max_waiting=1) as client:
        client.hang_up(asking(**ENDLESS, stream=stream), after_bytes=after_bytes)
        client.wait_for(400)  # its place is free
    assert len(steps) < ENDLESS["max_tokens"] / 2, "its answer was ended"


def test_our_own_fault_is_logged_under_the_id_that_the_client_gets(routed, caplog):
    broken = Predictor.load(routed.folder)
    with torch.no_grad():
        broken.model.router.gating.gate[1].weight.fill_(torch.nan)
    with serving(broken) as client:
        status, answer = client.ask(asking(images=[url(PHOTO)]))
        assert client.ask(asking(max_tokens=1))[0] == 200, "the server goes on"
    assert (status, answer["error"]["type"]) == (500, "server_error")
    (record,) = caplog.records
    assert record.exc_info
    assert answer["error"]["message"].split()[2].rstrip(";") in record.getMessage()
    assert "router" not in answer["error"]["message"]


def test_concurrent_requests_of_all_sorts_get_their_own_answers(routed):
    good = [asking(f"What is {letter}?", images=[url(PHOTO)], max_tokens=6) for letter in "ABCD"]
    sorts = [*good, b"{", asking(images=[url(b"no image")]), asking(images=[url(png(9, 9))]), asking(n=2)]
    with serving(routed) as client:
        alone = [client.ask(body) for body in sorts]
        with ThreadPoolExecutor(8) as pool:
            dropped = [pool.submit(client.hang_up, good[0]) for _ in range(4)]
            together = list(pool.map(client.ask, sorts * 2))
            assert all(one.exception() is None for one in dropped)
    assert [status for status, _ in alone] == [200] * 4 + [400] * 4
    for (status, answer), (other_status, other) in zip(alone * 2, together, strict=True):
        assert status == other_status
        assert answer.get("choices") == other.get("choices")
        assert answer.get("error") == other.get("error")
