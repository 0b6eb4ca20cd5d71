from pathlib import Path

import pytest

from vico_pl.data.shards.locations import parse_source, without_secrets

NAMES = ["train-000000.tar", "train-000001.tar", "train-000002.tar.gz"]


@pytest.fixture
def folder(tmp_path):
    for name in [*NAMES, "train-000000.idx", "notes.txt"]:
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", None),
        ("train-000001.tar", NAMES[1:2]),
        ("train-{000000..000001}.tar", NAMES[:2]),
        ("train-*", NAMES),
        ("train-*.tar", NAMES[:2]),
        ("train-00000[12]*", NAMES[1:]),
        ("train-{000000.tar,000002.tar.gz}", [NAMES[0], NAMES[2]]),
    ],
)
def test_shards_of_a_folder_are_named_in_many_ways(folder, text, names):
    for start in (f"{folder}/", f"file://{folder}/"):
        source = parse_source(start + text)
        assert (source.is_local, Path(source.base), source.names) == (True, folder, names)


def test_a_path_that_exists_is_taken_as_it_is(tmp_path):
    for name in ("odd[1].tar", "odd{1,2}.tar"):
        (tmp_path / name).touch()
        assert parse_source(f"{tmp_path}/{name}").names == [name]


@pytest.mark.parametrize(
    ("text", "base", "names"),
    [
        ("https://host/mine/", "https://host/mine", None),
        ("s3://bucket/a/b.tgz", "s3://bucket/a", ["b.tgz"]),
        ("gs://bucket/{a,b}.tar", "gs://bucket", ["a.tar", "b.tar"]),
        ("HTTP://host/a-{9..11}.tar.gz", "http://host", ["a-9.tar.gz", "a-10.tar.gz", "a-11.tar.gz"]),
    ],
)
@pytest.mark.parametrize("kind", [str, lambda text: str(Path(text))])
def test_urls_are_named_likewise_also_after_they_were_paths(text, base, names, kind):
    source = parse_source(kind(text))
    assert (source.is_local, source.base, source.names) == (False, base, names)
    assert source.location("x.tar") == f"{base}/x.tar"


def test_what_follows_a_question_mark_goes_along_with_every_file():
    source = parse_source("https://host/set?key=1")
    assert source.location("index.json") == "https://host/set/index.json?key=1"
    assert source.identity("index.json") == "https://host/set/index.json"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("absent", "no such folder of shards; make one"),
        ("absent.tar.zip", "no such folder of shards"),
        ("none-*.tar", "no such shard; expected names"),
        ("{a,b}/x.tar", "names shards of 'a' and 'b'"),
        ("https://host/{a,b}.zip", r"'a\.zip' is no shard; expected a name that ends in"),
        ("https://host/a-*.tar", "finds only files of a folder; name shards of a URL as"),
        ("s3://bucket/{000000000..999999999}.tar", "more than 1000000 shards"),
        ("pipe:cat a.tar", r"data\.streaming\.allow_pipe=true"),
        ("https://me:hush@host/{a,b}/x.tar?hush", "expected one folder"),
        ("https://me:hush@host/*.tar?hush", "finds only files"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence_without_secrets(text, message):
    with pytest.raises(ValueError, match=message) as caught:
        parse_source(text)
    assert "hush" not in str(caught.value)


def test_commands_name_their_shards_if_they_can():
    source = parse_source("pipe:ssh host cat /d/train-{0..1}.tar | zcat", allow_pipe=True)
    assert source.names == ["train-0.tar", "train-1.tar"]
    assert source.location("train-1.tar") == "pipe:ssh host cat /d/train-1.tar | zcat"
    assert parse_source("pipe:make {a,b}", allow_pipe=True).names == ["pipe-000000.tar", "pipe-000001.tar"]


@pytest.mark.parametrize(
    "text",
    [
        "https://me:hush@host/a.tar?x=hush:hush&y='hush': no such file",
        "cannot open url=URL('https://host/a.tar?hush')",
        "pipe:curl s3://me:hush@host/a?hush | zcat",
    ],
)
def test_messages_keep_no_passwords_and_signatures(text):
    shown = without_secrets(text)
    assert "hush" not in shown
    assert "host/a" in shown
