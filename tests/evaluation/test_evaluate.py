import json
from dataclasses import replace
from datetime import date

import pytest
import torch

from tests.support.folders import write_model_folder, write_set
from tests.support.tiny import encoded_image, tiny_spec
from vico_pl.data.shards.reader import RecordReader, read_index
from vico_pl.data.shards.tars import scan_boundaries
from vico_pl.evaluation import questions
from vico_pl.evaluation.baselines import fastv_answers
from vico_pl.evaluation.evaluate import PARETO_FRACTIONS, evaluate
from vico_pl.evaluation.questions import Measure, open_questions
from vico_pl.inference.predictor import Predictor
from vico_pl.model.router import NEVER, RoutingRule

SCORED = ("random", "pixel_detail", "statistics", "oracle")
ARMS = {"full", "all_compressed", "router", "downsample", *SCORED}
COLUMNS = {"perception", "reasoning", "ocr", "mean", "overall"}


@pytest.fixture(scope="module")
def evaluated(answered_by_folder):
    folder, answered = answered_by_folder
    return evaluate(open_questions(Predictor.load(folder), answered), seed=0, command="vico eval it")


@pytest.fixture
def report(evaluated):
    return evaluated[0]


def test_the_report_is_plain_json_with_the_keys_of_the_contract(report, model_folder, answered):
    figures = {"num_samples": 14, "num_left_out": 0, "seed": 0, "measure": Measure.SCORES, "reference": None}
    names = {"model": str(model_folder), "dataset": str(answered)}
    assert {name: report[name] for name in (*names, *figures)} == {**names, **figures}
    assert report.keys() == {*names, *figures, "made_with", "arms", "pareto"}
    made_with = report["made_with"]
    assert (made_with["command"], made_with["date"]) == ("vico eval it", date.today().isoformat())
    assert torch.__version__.startswith(made_with["torch"])
    assert report["arms"].keys() == ARMS
    costs = {"vision_tokens_per_image", "token_fraction", "first_token_ms", "prefill_gflops", "kv_cache_mib"}
    for arm in report["arms"].values():
        assert arm.keys() == {*costs, "accuracy", "accuracy_ci", "retention", "retention_ci"}
        for name in ("accuracy", "retention"):
            assert arm[name].keys() == arm[f"{name}_ci"].keys() == COLUMNS
            for column, (low, high) in arm[f"{name}_ci"].items():
                assert low <= arm[name][column] <= high
        assert arm["first_token_ms"] > 0
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    for point in report["pareto"]:
        assert point.keys() == {"arm", "threshold", "token_fraction", "accuracy_mean"}
        assert point["arm"] in ARMS


def test_a_model_that_answers_itself_is_right_at_full_tokens_and_arms_spend_what_they_claim(
    report, predictor, answered
):
    accuracy = {arm: entry["accuracy"]["mean"] for arm, entry in report["arms"].items()}
    assert accuracy["all_compressed"] < accuracy["router"] < accuracy["full"] == 1
    fractions = {arm: entry["token_fraction"] for arm, entry in report["arms"].items()}
    assert (fractions["full"], fractions["all_compressed"]) == (1, 0.25)
    assert 0.5 < fractions["router"] < 0.75
    assert {fractions[arm] for arm in SCORED} == {fractions["router"]}
    assert fractions["router"] - 0.2 < fractions["downsample"] <= fractions["router"]
    full = 4 * sum(len(sample.tiles) for sample in predictor.samples(answered)) / 14
    for arm, entry in report["arms"].items():
        assert entry["vision_tokens_per_image"] == pytest.approx(fractions[arm] * full, abs=2e-3)


def test_pareto_sweeps_every_arm_from_full_tokens_to_all_compressed(report):
    for arm in ("router", *SCORED):
        points = [p for p in report["pareto"] if p["arm"] == arm]
        fractions = [p["token_fraction"] for p in points]
        assert (fractions[0], fractions[-1]) == (1, 0.25)
        assert fractions == sorted(fractions, reverse=True)
        assert len(points) == len(PARETO_FRACTIONS)
        assert points[0]["accuracy_mean"] == 1
        assert points[-1]["accuracy_mean"] == pytest.approx(
            report["arms"]["all_compressed"]["accuracy"]["mean"], abs=1e-6
        )


def without_times(report):
    arms = {arm: {k: v for k, v in e.items() if k != "first_token_ms"} for arm, e in report["arms"].items()}
    return {**report, "arms": arms, "dataset": "", "num_left_out": 0, "made_with": {}}


def test_the_same_seed_gives_the_same_report_and_another_seed_another_lot(predictor, answered, report):
    again, _ = evaluate(open_questions(predictor, answered), seed=0)
    assert without_times(again) == without_times(report)
    other, _ = evaluate(open_questions(predictor, answered), seed=1)
    assert other["arms"]["full"]["accuracy"] == report["arms"]["full"]["accuracy"]
    assert other["arms"]["router"]["accuracy"] == report["arms"]["router"]["accuracy"]
    lots = [[p["accuracy_mean"] for p in r["pareto"] if p["arm"] == "random"] for r in (report, other)]
    assert lots[0] != lots[1]


def records_of(folder):
    index = read_index(folder)
    records = map(RecordReader(index), range(index.num_samples))
    return [(record.key, {name: bytes(file) for name, file in record.files.items()}) for record in records]


def test_bad_records_shift_nothing(predictor, answered, evaluated, tmp_path):
    """Each sample keeps its scores, ratios and answers, whatever unusable records stand between."""
    report, examples = evaluated
    records = records_of(answered)
    annotation = records[0][1]["json"]
    truncated = {"png": encoded_image("PNG", size=(64, 64))[:200], "json": annotation}
    bad = [("bad1", {"json": b"{"}), ("bad2", records[5][1])]
    mixed = [("bad0", truncated), *records[:5], *bad, *records[5:]]
    folder = write_set(tmp_path / "val", mixed)
    overwrite_header(folder, sample=7)  # bad2: no longer a tar member at all
    found, shown = evaluate(open_questions(predictor, folder), seed=0)
    assert without_times(found) == without_times(report)
    assert shown == examples


def overwrite_header(folder, *, sample):
    (path,) = folder.glob("*.tar")
    start = scan_boundaries(path)[sample]
    with path.open("r+b") as file:
        file.seek(start)
        file.write(b"\xff" * 512)


def test_groups_do_not_change_the_figures(predictor, answered, report, monkeypatch):
    monkeypatch.setattr(questions, "SAMPLES_PER_GROUP", 4)
    found, _ = evaluate(open_questions(predictor, answered), seed=0)
    for arm in ARMS - {"random"}:  # whose lots are drawn per group
        assert found["arms"][arm]["accuracy"] == report["arms"][arm]["accuracy"], arm
        assert found["arms"][arm]["token_fraction"] == report["arms"][arm]["token_fraction"], arm


def test_examples_show_what_was_asked_answered_and_compressed(predictor, answered, evaluated):
    _, examples = evaluated
    assert examples
    samples = list(predictor.samples(answered))
    for example in examples:
        sample = samples[example.question.sample]
        assert len(sample.tiles) >= 4 or example.loss > 0
        with torch.no_grad():
            assert example.ratios == predictor.choose_ratios(predictor.encode(sample.tiles)).tolist()
        texts = [turn.text for turn in sample.turns]
        asked = dict(zip(texts[::2], texts[1::2], strict=True))
        spent = [4 / ratio for ratio in example.ratios]
        assert example.token_fraction == pytest.approx(sum(spent) / len(spent))
        (text,), (expected,) = example.question.prompt, example.question.answers
        assert asked[text] == expected == example.full.answer
        assert (example.full.score, example.router.score) == (1, example.router.answer == expected)
    losses = [example.loss for example in examples]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] == 1, "what routing spoils comes first"
    assert len({example.question.sample for example in examples}) == len(examples)


def first_records(answered, count):
    return [record for record in records_of(answered) if json.loads(record[1]["json"])["skills"]][:count]


@pytest.mark.parametrize("count", [1, 2])
def test_a_set_of_very_few_samples_is_evaluated_too(predictor, answered, tmp_path, count):
    """Several fractions of so few tiles are the same number of tiles, and there is one sample to time."""
    folder = write_set(tmp_path / "few", first_records(answered, count))
    report, examples = evaluate(open_questions(predictor, folder), seed=0, num_examples=count - 1)
    assert len(examples) == count - 1
    assert report["num_samples"] == count
    for arm in report["arms"].values():
        assert 0.25 <= arm["token_fraction"] <= 1
        assert arm["first_token_ms"] > 0
    points = [(p["arm"], p["token_fraction"]) for p in report["pareto"]]
    assert len(points) == len(set(points))


@pytest.mark.parametrize(("threshold", "fraction"), [(NEVER, 1), (0.0, 0.25)])
def test_a_router_that_keeps_or_compresses_everything_is_evaluated_too(
    predictor, answered, threshold, fraction
):
    predictor = replace(predictor, rule=RoutingRule(threshold=threshold))
    report, _ = evaluate(open_questions(predictor, answered), seed=0)
    for arm in ("router", *SCORED):
        assert report["arms"][arm]["token_fraction"] == fraction


def annotation(turns, skills):
    conversations = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(turns)]
    return json.dumps({"conversations": conversations, "skills": skills}).encode()


def test_samples_with_several_images_in_any_turn_and_with_none_are_evaluated(predictor, answered, tmp_path):
    images = {f"{i}.png": encoded_image("PNG", size=(64, 32), seed=i) for i in range(2)}
    records = [
        ("two", {**images, "json": annotation(["<image>\n<image>\nA?", "a"], ["ocr"])}),
        ("later", {**images, "json": annotation(["<image>A?", "a", "<image>B?", "b"], ["ocr", "ocr"])}),
        ("none", {"json": annotation(["Who?", "me"], ["perception"])}),
        *first_records(answered, 1),
    ]
    report, examples = evaluate(open_questions(predictor, write_set(tmp_path / "mixed", records)), seed=0)
    assert report["num_samples"] == 4
    fraction = {arm: report["arms"][arm]["token_fraction"] for arm in ("downsample", "router")}
    one_tile_each = round(5 / 13, 5)
    assert fraction["downsample"] <= max(fraction["router"], one_tile_each)
    assert {example.question.sample for example in examples} <= {3}, "the gallery draws single images"


def test_what_cannot_be_evaluated_is_refused(predictor, answered, tmp_path):
    text = write_set(tmp_path / "text", [("0", {"json": annotation(["Who?", "me"], ["ocr"])})])
    image = encoded_image("PNG", size=(32, 32))
    files = {"png": image, "json": annotation(["<image>A?", "no: such answer"], ["ocr"])}
    wrong = write_set(tmp_path / "wrong", [("0", files)])
    for folder, arms, reason in (
        (tmp_path / "absent", None, "no such folder of shards"),
        (text, None, f"{text}: no image to calibrate or evaluate on"),
        (wrong, None, f"{wrong}: 0 % right at full tokens"),
        (answered, ["magic"], r"no arm 'magic'; this model has full, all_compressed, router, .*"),
    ):
        with pytest.raises(ValueError, match=reason):
            evaluate(open_questions(predictor, folder), seed=0, arms=arms)


@pytest.mark.parametrize("arms", [["router", "downsample"], ["statistics"]])
def test_arms_can_be_chosen_and_keep_their_figures(predictor, answered, report, arms):
    found, _ = evaluate(open_questions(predictor, answered), seed=0, arms=arms)
    assert found["arms"].keys() == {"full", *arms}
    assert found["pareto"] == []
    for arm, figures in without_times(found)["arms"].items():
        assert figures == without_times(report)["arms"][arm]


def test_costs_are_those_of_the_prompts_at_the_tokens_of_the_arm(predictor, answered, tmp_path):
    """By hand: 2 layers of 7680 weights, 2 heads of 16 per pair, one key-value head of 16 in float32."""
    folder = write_set(tmp_path / "one", first_records(answered, 1))
    found, _ = evaluate(open_questions(predictor, folder), seed=0, arms=["all_compressed"])
    (sample,) = predictor.samples(folder)
    prompts = [predictor.encode_prompt(sample, turn.text).input_ids for turn in sample.turns[::2]]
    for arm, of_tile in (("full", 4), ("all_compressed", 1)):
        lengths = [len(ids) + (of_tile - 1) * len(sample.tiles) for ids in prompts]
        flops = [2 * (2 * 7680 * n + 2 * 2 * 32 * n * (n + 1) / 2) for n in lengths]
        head = 2 * 32 * len(predictor.tokenizer)
        cost, count = found["arms"][arm], len(prompts)
        assert cost["prefill_gflops"] == pytest.approx(sum(flops) / count / 1e9 + head / 1e9, abs=1e-6)
        assert cost["kv_cache_mib"] == pytest.approx(2 * 2 * 16 * 4 * sum(lengths) / count / 2**20, abs=1e-6)


def test_untrained_arms_are_evaluated_when_named_at_the_budget_of_the_router(
    predictor, answered, report, monkeypatch
):
    asked = []
    monkeypatch.setattr(
        "vico_pl.evaluation.baselines.fastv_answers",
        lambda *given, **settings: asked.append(settings) or fastv_answers(*given, **settings),
    )
    arms = ["fastv", "average_pooling"]
    found, _ = evaluate(open_questions(predictor, answered), seed=0, arms=arms)
    arms = found["arms"]
    assert arms.keys() == {"full", "router", "average_pooling", "fastv"}
    fraction = arms["router"]["token_fraction"]
    assert arms["average_pooling"]["token_fraction"] == fraction
    assert arms["fastv"]["token_fraction"] == pytest.approx(fraction, abs=0.02)
    assert {round(settings["keep_fraction"], 5) for settings in asked} == {fraction}
    costs = {arm: figures["prefill_gflops"] for arm, figures in arms.items()}
    assert costs["average_pooling"] == costs["router"] < costs["full"]
    assert costs["fastv"] == costs["full"], "both layers of this model see all tokens"
    assert arms["fastv"]["accuracy"]["overall"] == 1, "so that it answers as at full tokens"
    assert arms["average_pooling"]["accuracy"]["overall"] not in (0, 1, arms["router"]["accuracy"]["overall"])
    assert arms["router"]["accuracy"] == report["arms"]["router"]["accuracy"]


def test_untrained_arms_that_cannot_run_are_refused(predictor, answered, tmp_path):
    windows = {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1}
    for changes, reason in (
        ({"model_type": "gpt2"}, "model is gpt2; FastV needs one of"),
        (windows, "windows"),
    ):
        language = {**tiny_spec().language, "vocab_size": len(predictor.tokenizer), **changes}
        other = Predictor.load(write_model_folder(tmp_path / reason, threshold=0.5, language=language))
        with pytest.raises(ValueError, match=reason):
            evaluate(open_questions(other, answered), seed=0, arms=["fastv"])
    records = [(key, {**files, "json": without_skills(files["json"])}) for key, files in records_of(answered)]
    plain = open_questions(predictor, write_set(tmp_path / "plain", records))
    with pytest.raises(ValueError, match=r"plain: arm 'average_pooling' needs answers to score; .*--metric"):
        evaluate(plain, seed=0, arms=["average_pooling"])


def test_a_model_without_router_or_calibration_is_evaluated_too(predictor, answered, tmp_path):
    report, examples = evaluate(open_questions(replace(predictor, rule=None), answered), seed=0)
    assert report["arms"].keys() == {"full", "all_compressed"}
    assert {point["arm"] for point in report["pareto"]} == {*SCORED}
    assert examples == []
    base = Predictor.load(write_model_folder(tmp_path / "base", ratios=[4], router_heads=None))
    report, _ = evaluate(open_questions(base, answered), seed=0)
    assert (report["arms"].keys(), report["pareto"]) == ({"full"}, [])


def test_with_a_reference_retention_is_relative_to_it(predictor, other, answered):
    """The set's answers are those of `predictor`, so as the reference it is right everywhere."""
    found, _ = evaluate(open_questions(other, answered), seed=0, arms=["all_compressed"], reference=predictor)
    assert found["reference"] == str(predictor.folder)
    arms = {arm: (f["accuracy"]["overall"], f["retention"]["overall"]) for arm, f in found["arms"].items()}
    assert arms["reference"] == (1, 1)
    assert arms["full"][0] == arms["full"][1] < 1


def test_agreement_is_reported_where_answers_have_no_metric(predictor, other, answered, tmp_path):
    records = [(key, {**files, "json": without_skills(files["json"])}) for key, files in records_of(answered)]
    questions = open_questions(predictor, write_set(tmp_path / "plain", records))
    report, examples = evaluate(questions, seed=0)
    assert report["measure"] == Measure.ANSWERS
    accuracy = {arm: figures["accuracy"]["overall"] for arm, figures in report["arms"].items()}
    assert accuracy["full"] == 1 > accuracy["router"] > accuracy["all_compressed"] > 0
    assert accuracy["oracle"] > accuracy["random"]
    assert {example.full.answer for example in examples} == {""}
    with_other, _ = evaluate(questions, seed=0, arms=["all_compressed"], reference=other)
    assert with_other["measure"] == "agreement with the reference at full tokens on the answers of the data"
    assert with_other["arms"]["full"]["accuracy"]["overall"] < 1


def without_skills(content):
    return json.dumps({"conversations": json.loads(content)["conversations"]}).encode()
