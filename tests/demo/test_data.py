"""What the demo learns is real, the same every time, and not what it is tested on."""

import itertools
from pathlib import Path

import pytest
import torch

from soonest.demo.data import HELD_OUT, Corpus, batches, held_out_batches


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for index in range(30):
        (tmp_path / f"module{index:02}.py").write_text(f"# {index:02}\n" * 100)
    for name in ("site-packages/numpy.py", "test/test_a.py", "json/tests/test_b.py", "notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("not this\n" * 100)
    (tmp_path / "json" / "decoder.py").write_text("# js\n" * 100)
    return tmp_path


def test_the_standard_library_is_read_alike_every_time():
    one, other = Corpus.read(), Corpus.read()
    assert one.train_files == other.train_files
    assert torch.equal(one.train, other.train)
    assert torch.equal(one.held_out, other.held_out)
    assert len(one.train) > 1_000_000
    assert len(one.held_out) > 50_000
    assert b"def " in bytes(one.train[:100_000].tolist())


def test_no_file_is_both_learned_and_tested(folder: Path):
    corpus = Corpus.read(folder)
    assert not set(corpus.train_files) & set(corpus.held_out_files)
    assert len(corpus.train_files) + len(corpus.held_out_files) == 31
    assert len(corpus.held_out_files) == 31 // HELD_OUT
    train, held_out = (bytes(data.tolist()) for data in (corpus.train, corpus.held_out))
    assert not set(train.splitlines()) & set(held_out.splitlines())
    assert b"js" in train + held_out
    assert b"not this" not in train + held_out


def test_it_stops_reading_in_time(folder: Path):
    corpus = Corpus.read(folder, most_bytes=10 * 500 + 7)
    assert len(corpus.train) + len(corpus.held_out) == 5007


def test_too_few_files_are_refused(tmp_path: Path):
    (tmp_path / "only.py").write_text("pass")
    with pytest.raises(ValueError, match="only 1 Python files"):
        Corpus.read(tmp_path)


def test_batches_are_the_same_for_the_same_seed_only():
    data = torch.randint(256, (5000,), dtype=torch.uint8)
    one, same, other = (
        list(itertools.islice(batches(data, seed=seed, size=3, length=16), 4)) for seed in (1, 1, 2)
    )
    for (inputs, targets), (inputs_again, targets_again) in zip(one, same, strict=True):
        assert torch.equal(inputs, inputs_again)
        assert torch.equal(targets, targets_again)
    assert not any(torch.equal(a[0], b[0]) for a, b in zip(one, other, strict=True))


def test_a_target_is_the_byte_behind_its_input():
    data = torch.arange(200, dtype=torch.uint8)
    inputs, targets = next(batches(data, seed=0, size=5, length=32))
    assert inputs.shape == targets.shape == (5, 32)
    assert inputs.dtype == torch.long
    assert torch.equal(targets, inputs + 1)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_ranks_share_the_held_out_pieces(ranks: int):
    data = torch.arange(250, dtype=torch.uint8)
    starts = [
        int(row[0])
        for rank in range(ranks)
        for inputs, _ in held_out_batches(
            data, pieces=24, size=4, length=10, rank=rank, ranks=ranks
        )
        for row in inputs
    ]
    assert sorted(starts) == sorted({*starts})
    assert len(starts) == 24
    assert (min(starts), max(starts)) == (0, 250 - 10 - 1)
