"""Data are counted before training as training counts them; where they cannot be, the answer says so."""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from runner.config.conf_files import load_choice, options
from runner.data.inspect.lengths import DataLengths, lengths, optimizer_steps, packed_sequences
from runner.data.inspect.token_counts import tokenizer_file
from runner.data.pretraining.corpus_checks import stored_bytes
from runner.errors import RequestError
from runner.spec import DataSpec, ModelSpec, RunSpec
from tests.conftest import spec_of

NOWHERE = ModelSpec(id="nobody/nothing")
COMMANDS = DataSpec(**load_choice("data", "commands"))
SMOLLM2 = ModelSpec(**load_choice("model", "smollm2_135m"))
ON_THE_HUB = [name for name in options("data") if name != "hub" and load_choice("data", name).get("source") == "hub"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "real_cache" not in request.fixturenames:
        monkeypatch.setenv("RUNNER_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def real_cache() -> None:
    """The cache that holds the unpacked demo model: unpacked now, if no test has done it before."""
    if tokenizer_file(SMOLLM2) is None:
        from runner.train.model_loading import source_of

        source_of(SMOLLM2)


def rows_file(path: Path, count: int, words: int = 4) -> Path:
    """Rows of `4 × words` characters in prompt and answer together, numbered so that none is like another."""
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            prompt = f"{number:07d} "
            file.write(json.dumps({"prompt": prompt, "completion": "x" * (4 * words - len(prompt))}) + "\n")
    return path


def counted(path: Path, **settings: object) -> DataLengths:
    """Lengths of a file, for a model whose tokenizer is not here."""
    return lengths(DataSpec.model_validate({"path": str(path), **settings}), NOWHERE)


def test_the_default_job_is_known_to_the_token(real_cache: None) -> None:
    """What the worker prints: 39,761 tokens in 168 sequences; 294 steps of one are 1.75 epochs."""
    found = lengths(COMMANDS, SMOLLM2)
    assert (found.num_examples, sum(found.row_tokens), found.exact) == (600, 39_761, True)
    assert packed_sequences(found.row_tokens, 256) == 168
    assert optimizer_steps(spec_of(), found) == (294, 69_582, [])
    assert found.held_out_tokens_per_row is not None
    assert (found.held_out_rows, round(40 * found.held_out_tokens_per_row), found.answer_tokens) == (40, 2655, 31)


def test_before_the_demo_model_is_unpacked_its_steps_are_those_that_the_run_takes() -> None:
    """294, as the test above says and the worker takes."""
    found = lengths(COMMANDS, SMOLLM2)
    assert tokenizer_file(SMOLLM2) is None
    assert found.num_examples == len(found.row_tokens) == 600 and not found.exact
    assert found.tokens_per_example == pytest.approx(66.27, rel=0.02)
    assert found.held_out_tokens_per_row == pytest.approx(66.38, rel=0.02)
    assert found.answer_tokens == pytest.approx(31, abs=3)
    count, tokens, (note,) = optimizer_steps(spec_of(), found)
    assert count == pytest.approx(294, abs=1) and tokens == pytest.approx(69_582, rel=0.02)
    assert note == (
        "about 66 tokens a row: all rows, 2.42 characters a token assumed: the tokenizer is not on this machine"
    )


def test_what_is_held_out_is_counted_for_the_time_that_it_takes(tmp_path: Path) -> None:
    file, other = rows_file(tmp_path / "my.jsonl", 100, words=25), rows_file(tmp_path / "held.jsonl", 30, words=50)
    assert _held(counted(file, eval_fraction=0.1)) == (10, 35, 24)  # 92 characters, and the end of the answer
    assert _held(counted(file, eval_path=str(other))) == (30, 60, 49)
    assert _held(counted(file, eval_path=str(other), max_eval_examples=7))[0] == 7
    assert _held(counted(file, eval_fraction=0.0)) == (0, None, 0)
    (tmp_path / "text.jsonl").write_text('{"text": "once upon a time"}\n' * 10)
    assert _held(counted(tmp_path / "text.jsonl", eval_fraction=0.1)) == (1, 5, 0)  # nothing is asked


def _held(found: DataLengths) -> tuple[int | None, float | None, int | None]:
    return found.held_out_rows, found.held_out_tokens_per_row, found.answer_tokens


def test_of_large_data_the_held_out_rows_are_like_the_others(tmp_path: Path) -> None:
    found = counted(rows_file(tmp_path / "my.jsonl", 20_000, words=25), eval_fraction=0.1)
    assert (found.tokens_per_example, found.held_out_tokens_per_row, found.answer_tokens) == (35, 35, 24)
    assert found.held_out_rows == pytest.approx(2000, rel=0.01)
    assert found.num_examples == pytest.approx(18_000, rel=0.01)


def test_a_small_file_is_counted_whole_and_its_held_out_rows_are_taken_off(tmp_path: Path) -> None:
    file = rows_file(tmp_path / "my.jsonl", 100, words=25)
    found = counted(file, eval_fraction=0.1)
    assert found.num_examples == 90
    assert found.tokens_per_example == 25 + 2 * 5  # two turns of ChatML
    assert counted(file, eval_fraction=0.0).num_examples == 100
    assert counted(file, eval_path=str(file)).num_examples == 100
    assert counted(file, max_examples=7).num_examples == 7


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "jsonl.gz", "json lines"])
def test_of_a_large_file_the_beginning_tells_the_rest(tmp_path: Path, kind: str) -> None:
    rows = [{"prompt": f"{n:07d} " + "a b " * 25, "completion": "yes"} for n in range(30_000)]
    lines = "\n".join(map(json.dumps, rows)) + "\n"
    delimiter = "\t" if kind == "tsv" else ","
    text = {
        "json": json.dumps(rows, indent=1),
        "csv": "prompt,completion\n" + "".join(f"{r['prompt']}{delimiter}{r['completion']}\n" for r in rows),
    }
    text["tsv"] = text["csv"].replace(",", "\t")
    body = text.get(kind, lines)
    if kind == "jsonl.gz":
        # Hashes: an archive of the rows above would be small.
        hashes = (hashlib.sha512(str(n).encode()).hexdigest() * 2 for n in range(30_000))
        body = "".join(json.dumps({"text": text}) + "\n" for text in hashes)
    file = tmp_path / f"my.{kind.replace('json lines', 'json')}"
    file.write_bytes(gzip.compress(body.encode(), 1) if kind.endswith("gz") else body.encode())
    assert file.stat().st_size > 2_000_000
    found = counted(file, eval_fraction=0.0)
    assert found.num_examples == pytest.approx(30_000, rel=0.01) and not found.exact
    assert "estimated from the first" in found.how and "tokens of 200 rows" in found.how
    assert found.tokens_per_example == pytest.approx(65 if kind.endswith("gz") else 111 / 4 + 10, abs=0.6)


def test_a_parquet_file_knows_its_own_row_count(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    texts = [f"{n:07d}" * 20 for n in range(40_000)]
    parquet.write_table(
        pyarrow.table({"text": texts}), tmp_path / "my.parquet", compression="none", use_dictionary=False
    )
    found = counted(tmp_path / "my.parquet", eval_fraction=0.05)
    assert found.num_examples == 38_000
    assert found.tokens_per_example == 36  # 140 characters and the end of the text


def test_a_changed_file_is_counted_again_and_an_unchanged_one_is_not(tmp_path: Path) -> None:
    file = rows_file(tmp_path / "my.jsonl", 50)
    assert counted(file, eval_fraction=0.0).num_examples == 50
    (stored,) = (tmp_path / "cache" / "lengths").iterdir()
    stored.write_text(json.dumps({**json.loads(stored.read_text()), "num_examples": 51}))
    assert counted(file, eval_fraction=0.0).num_examples == 51
    rows_file(file, 60)
    assert counted(file, eval_fraction=0.0).num_examples == 60


def test_a_broken_cache_and_one_that_cannot_be_written_are_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = rows_file(tmp_path / "my.jsonl", 50)
    first = counted(file)
    (stored,) = (tmp_path / "cache" / "lengths").iterdir()
    stored.write_text("{")
    assert counted(file) == first
    monkeypatch.setenv("RUNNER_CACHE", "/dev/null/cache")
    assert counted(file) == first


def test_a_file_that_is_not_there_is_an_error_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"my\.jsonl does not exist"):
        counted(tmp_path / "my.jsonl")


def test_data_on_the_hub_are_not_guessed() -> None:
    found = lengths(DataSpec(name="hub", source="hub", id="org/rows"), SMOLLM2)
    assert (found.num_examples, found.tokens_per_example, found.exact) == (None, None, False)
    assert _held(found) == (None, None, None)
    count, tokens, notes = optimizer_steps(_spec(), found)
    assert (count, tokens) == (None, None) and "org/rows is on the Hub" in notes[0]


def test_data_of_the_catalogue_are_as_large_as_their_card_says() -> None:
    found = lengths(DataSpec(**load_choice("data", "gsm8k")), SMOLLM2)
    assert (found.num_examples, found.tokens_per_example, found.exact) == (7473, 132.5, False)
    assert _held(found) == (1319, 132.5, None)
    assert lengths(DataSpec(**load_choice("data", "gsm8k"), max_eval_examples=50), SMOLLM2).held_out_rows == 50
    assert lengths(DataSpec(**load_choice("data", "gsm8k"), max_examples=100), SMOLLM2).num_examples == 100
    count, _, notes = optimizer_steps(_spec(num_epochs=1, packing=False), found)
    at_once = 2 * 2  # micro batch and processes of `_spec`
    assert count == math.ceil(math.ceil(7473 / at_once) / 4) and "the card of openai/gsm8k states" in notes[0]


@pytest.mark.parametrize(
    "change", [{"split": "test"}, {"subset": "socratic"}, {"revision": "v1"}, {"eval_split": None}]
)
def test_the_card_says_nothing_of_another_split(change: dict[str, str | None]) -> None:
    assert lengths(DataSpec(**{**load_choice("data", "gsm8k"), **change}), SMOLLM2).num_examples is None


@pytest.mark.parametrize("name", ON_THE_HUB)
def test_no_data_set_of_the_catalogue_is_of_unknown_size(name: str) -> None:
    found = lengths(DataSpec(**load_choice("data", name)), SMOLLM2)
    assert found.num_examples and found.tokens_per_example and found.held_out_rows
    assert found.how.startswith("an estimate: ")


def test_sizes_that_are_typed_are_planned_with() -> None:
    data = DataSpec(name="hub", source="hub", id="org/rows", num_rows=1000, tokens_per_row=97)
    found = lengths(data, SMOLLM2)
    assert (found.num_examples, found.tokens_per_example, found.exact) == (950, 97, False)
    assert _held(found) == (50, 97, None)
    assert found.how == "an estimate: tokens as the card of org/rows states"
    # 950 × 97 / (100 × 0.97) = 950 sequences; 238 micro batches of 2 × 2, 60 steps of 4 of them, twice.
    assert optimizer_steps(_spec(num_epochs=2), found)[:2] == (120, 2 * 950 * 97)
    few = lengths(data.model_copy(update={"max_examples": 100}), SMOLLM2)
    assert optimizer_steps(_spec(num_epochs=1, packing=False), few)[:2] == (7, 100 * 97)
    assert lengths(data.model_copy(update={"num_rows": None, "max_examples": 10}), SMOLLM2).tokens_per_example == 97


def test_sizes_of_the_catalogue_are_not_those_of_another_data_set() -> None:
    data = DataSpec(**{**load_choice("data", "gsm8k"), "id": "org/rows", "num_rows": 70})
    found = lengths(data, SMOLLM2)
    assert (found.num_examples, found.tokens_per_example, found.held_out_rows) == (70, None, None)
    unknown = (0.0, 0.0, ["disk: the size of org/rows is not known, and not counted"])
    assert stored_bytes(_spec().model_copy(update={"data": data}), found) == unknown


def test_the_hubs_cache_and_a_folder_have_tokenizers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = tmp_path / "hub" / "models--org--name"
    snapshot = hub / "snapshots" / "abc123"
    snapshot.mkdir(parents=True)
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("abc123")
    (snapshot / "tokenizer.json").write_text("{}")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    assert tokenizer_file(ModelSpec(id="org/name")) == snapshot / "tokenizer.json"
    assert tokenizer_file(ModelSpec(id=str(snapshot))) == snapshot / "tokenizer.json"
    assert tokenizer_file(ModelSpec(id="org/other")) is None


def _spec(**train: object) -> RunSpec:
    settings = {"micro_batch_size": 2, "accumulation_steps": 4, "batch_size": 16, "max_length": 100, **train}
    return RunSpec.model_validate(
        {
            "model": {"id": "a/b"},
            "method": {"name": "lora"},
            "hw": {"name": "two", "accelerator": "cuda", "num_gpus": 2},
            "data": {"path": "my.jsonl"},
            "train": settings,
        }
    )


def test_estimated_rows_are_packed_to_97_percent() -> None:
    count, tokens, notes = optimizer_steps(_spec(num_epochs=2), DataLengths(970, 50.0, False, "a sample"))
    # 970 × 50 / (100 × 0.97) = 500 sequences; 125 micro batches of 2 × 2, 32 steps of 4 of them, twice.
    assert (count, tokens) == (64, 97_000)
    assert notes == ["about 970 rows of 50 tokens: a sample", "packing assumed to fill 97% of a sequence"]


def test_without_packing_each_row_is_a_sequence_and_long_ones_are_cut() -> None:
    count, tokens, _ = optimizer_steps(
        _spec(packing=False, num_epochs=1), DataLengths(3, 90.0, True, "", (10, 60, 200))
    )
    assert (count, tokens) == (1, 170)


def test_max_steps_stand_for_data_that_nobody_counted() -> None:
    assert optimizer_steps(_spec(max_steps=10), DataLengths(None, None, False, "?"))[:2] == (10, 10 * 16 * 100)
    assert optimizer_steps(_spec(max_steps=10, packing=False), DataLengths(32, 50.0, False, "?"))[:2] == (10, 5 * 1600)


def test_rows_go_where_they_leave_the_least_room() -> None:
    assert packed_sequences((60, 50, 50, 40), 100) == 2
    assert packed_sequences((60, 45, 50, 40), 100) == 2
    assert packed_sequences((60, 60, 60), 100) == 3
    assert packed_sequences((100, 0, 1), 100) == 2


def test_packing_and_steps_are_those_of_the_trainer() -> None:
    """Against TRL's own packing and transformers' own count, on lengths as they come."""
    import random

    import datasets
    import trl

    rng = random.Random(3)
    rows = tuple(min(512, 1 + int(rng.expovariate(1 / 120))) for _ in range(700))
    table = datasets.Dataset.from_dict({"input_ids": [[1] * n for n in rows]})
    by_trl = len(trl.pack_dataset(table, 512, "bfd"))
    assert packed_sequences(rows, 512) == by_trl
    for epochs in (0.5, 1.0, 2.7):
        spec = _spec(num_epochs=epochs, max_length=512)
        assert optimizer_steps(spec, DataLengths(700, 120.0, True, "", rows))[0] == spec.train.num_steps(
            by_trl, spec.hw.world_size
        )


def test_counting_needs_neither_torch_nor_transformers_nor_much_time() -> None:
    code = (
        "import sys, runner.runs.launch, time; began = time.process_time(); import runner.data.inspect.lengths; "
        "print(time.process_time() - began, {'torch', 'transformers', 'numpy', 'tokenizers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, loaded = done.stdout.split(maxsplit=1)
    assert loaded.strip() == "set()"
    assert float(seconds) < 0.2  # 0.015 on a machine with nothing else to do
