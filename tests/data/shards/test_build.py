import pytest

from vico_pl.data.glyphs import GlyphsConfig
from vico_pl.data.shards.build import build_glyphs, build_set
from vico_pl.data.shards.index import INDEX_NAME
from vico_pl.data.shards.reader import RecordReader, read_index

# Shards are drawn by several processes at once, as users have it.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


def build(folder, *, num_samples=5):
    config = GlyphsConfig(max_tiles=1, questions_per_image=1)
    return build_glyphs(folder, config, num_samples=num_samples, seed=1, samples_per_shard=2)


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_set_has_all_its_samples_in_shards_of_the_asked_size(tmp_path):
    index = build(tmp_path / "glyphs")
    assert index.names == ["glyphs-000000.tar", "glyphs-000001.tar", "glyphs-000002.tar"]
    assert index.shard_sizes == [2, 2, 1]
    reader = RecordReader(index)
    assert [reader(i).key for i in range(5)] == [f"{i:08d}" for i in range(5)]


@pytest.mark.parametrize(
    "lost",
    [
        ["glyphs-000001.tar", "glyphs-000001.idx", INDEX_NAME],  # killed while shard 1 was drawn
        ["glyphs-000001.idx", INDEX_NAME],  # killed between a shard and its side index
        ["glyphs-000001.tar", INDEX_NAME],
        [INDEX_NAME],
    ],
)
def test_an_interrupted_set_is_continued_to_the_same_bytes(tmp_path, lost):
    build(tmp_path / "glyphs")
    whole = content(tmp_path / "glyphs")
    for name in lost:
        (tmp_path / "glyphs" / name).unlink()
    (tmp_path / "glyphs" / ".glyphs-000001.tar.1-1.partial").write_bytes(b"half")
    first = tmp_path / "glyphs" / "glyphs-000000.tar"
    time = first.stat().st_mtime_ns
    build(tmp_path / "glyphs")
    assert content(tmp_path / "glyphs") == whole
    assert first.stat().st_mtime_ns == time, "a whole shard is not drawn again"


def test_a_whole_set_is_left_alone_and_another_size_refused(tmp_path):
    build(tmp_path / "glyphs")
    before = content(tmp_path / "glyphs")
    assert build(tmp_path / "glyphs").num_samples == 5
    with pytest.raises(ValueError, match="already holds a set of other annotations, images or settings"):
        build(tmp_path / "glyphs", num_samples=6)
    assert content(tmp_path / "glyphs") == before


def _records_or_fail(part):
    if part.start == 2:
        raise OSError("No space left on device")
    return [(str(i), {"json": b"{}"}) for i in part]


def test_a_set_that_failed_is_not_marked_as_whole(tmp_path):
    with pytest.raises(OSError, match="No space left"):
        build_set(tmp_path / "a", _records_or_fail, [range(2), range(2, 4), range(4, 6)], settings={})
    assert not (tmp_path / "a" / INDEX_NAME).exists()
    with pytest.raises(ValueError, match="holds a part of a set that 'vico shards build' began"):
        read_index(tmp_path / "a")
