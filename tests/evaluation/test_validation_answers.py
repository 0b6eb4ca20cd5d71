"""Answers in a run's validations: the model answers an evaluation set that was made from its own answers."""

import json

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.support.folders import write_set
from tests.support.runs import recipe, run
from tests.support.tiny import record
from vico_pl.evaluation.answering import EvalQuestion
from vico_pl.evaluation.validation_answers import Row, format_rows


def run_dir_of(tmp_path, stage, model_folder, answered, **entry):
    """Train nothing for two steps, with a validation after the second."""
    sets = [{"name": "held", "path": str(answered), **entry}]
    model = {"path": str(model_folder), "reference": str(model_folder)}
    data = {"sources": [{"path": str(answered)}], "num_workers": 0}  # tiled as the model says
    path = recipe(tmp_path, stage, answered, model=model, data=data)
    settings = [f"data.validation={yaml.safe_dump(sets, default_flow_style=True)}", "optim.lr=0"]
    run(path, *settings, "trainer.max_steps=2", "trainer.validate_every=2", "router.min_history=1")
    return tmp_path / stage


def scores_of(run_dir):
    *_, last = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return {name.split("/")[-1]: value for name, value in last.items() if "score_" in name}


@pytest.mark.parametrize(("stage", "choice"), [("consistency", "ratio_16"), ("router", "routed")])
def test_answers_are_scored_at_full_tokens_and_compressed(tmp_path, model_folder, answered, stage, choice):
    found = scores_of(run_dir_of(tmp_path, stage, model_folder, answered, answers=14))
    assert found.keys() == {"score_full", f"score_{choice}"}
    assert found["score_full"] == 1
    assert found[f"score_{choice}"] < 1


def test_as_many_samples_are_asked_as_the_recipe_says(tmp_path, model_folder, answered):
    run_dir = run_dir_of(tmp_path, "consistency", model_folder, answered, answers=2)
    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"tensors": 0})
    events.Reload()
    (text,) = events.Tensors("val/held/answers/text_summary")
    header, _, *rows = text.tensor_proto.string_val[0].decode().splitlines()
    assert header == "| sample | question | expected | full | ratio_16 |"
    _, _, expected, full, _ = rows[0].strip("| ").split(" | ")
    assert expected == full
    assert len({row.split(" | ")[0] for row in rows}) == len(rows) == 2


def test_no_answers_are_asked_of_a_set_that_wants_none(tmp_path, model_folder, answered):
    assert scores_of(run_dir_of(tmp_path, "consistency", model_folder, answered, answers=0)) == {}


def test_an_unknown_metric_shows_before_the_first_step(tmp_path, model_folder):
    unknown = write_set(tmp_path / "unknown", [("0", record(metrics=["blue"]).files)])
    with pytest.raises(ValueError, match="metric is 'blue'; expected one of exact"):
        run_dir_of(tmp_path, "consistency", model_folder, unknown)
    assert not (tmp_path / "consistency" / "metrics.jsonl").exists()


def test_texts_cannot_break_the_table():
    question = EvalQuestion(
        sample=0, group="", metric="", prompt=("Who?", "I", "<image>\na|b?\nc"), answers=()
    )
    *_, row = format_rows([Row("x", question, {"full": "yes\n"})]).splitlines()
    assert row == "| x | a/b? c | - | yes |"


@pytest.mark.filterwarnings("ignore:.*bad records are left out:UserWarning")
def test_samples_that_the_run_cannot_use_are_not_asked_about_and_texts_are(tmp_path, model_folder, answered):
    long = record(key="0", text="<image>\n" + "Why? " * 3000, skills=["ocr"])
    text = record(key="1", text="Who?", skills=["ocr"], files={"jpg": None})
    usable = record(key="2", skills=["ocr"])
    mixed = write_set(tmp_path / "mixed", [(each.key, each.files) for each in (long, text, usable)])
    found = scores_of(run_dir_of(tmp_path, "router", model_folder, answered, path=str(mixed)))
    assert found.keys() == {"score_full", "score_routed"}
