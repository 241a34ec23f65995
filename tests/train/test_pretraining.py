"""From nothing: shards, a tokenizer, random weights, a loss below what words alone would give; stages are skipped."""

from __future__ import annotations

import io
import json
import math
from collections import Counter
from pathlib import Path

import pytest
from datasets import Dataset
from rich.console import Console
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import AutoTokenizer

from runner.data.pretraining.sharder import lines_of
from runner.data.pretraining.tokenizer import bundle_folder
from runner.data.pretraining.workspace import manifest_of
from runner.errors import RequestError
from runner.plan.plan import Plan
from runner.report.progress import Progress
from runner.resolve import plan_inputs
from runner.rundir.directory import RunDir
from runner.runs import inputs
from runner.train.tokens.fill_token_cache import fill_cache
from tests.conftest import run_cli, spec_of, train_here

# recipes/pretrain_22m.yaml, small enough for seconds: 2 layers of 64, 384 tokens, 1,500 paragraphs.
SMALL = (
    "recipe=pretrain_22m", "hw=cpu", "hw.num_cpus=1", "model.hidden_size=64", "model.intermediate_size=176",
    "model.num_layers=2", "model.num_heads=4", "model.num_kv_heads=4", "model.vocab_size=384",
    "model.num_parameters=null", "objective.experiment=small", "objective.take=1500", "train.max_length=64",
    "train.batch_size=8", "train.micro_batch_size=8", "train.learning_rate=1e-2", "train.precision=fp32",
)  # fmt: skip


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The seed's quickstart in a folder of its own: one command does all four stages."""
    folder = tmp_path_factory.mktemp("quickstart")
    done = run_cli(*SMALL, "train.max_steps=150", cwd=folder)
    assert done.returncode == 0, done.stderr
    (folder / "out.txt").write_text(done.stdout, "utf-8")
    return folder


def the_run(folder: Path) -> RunDir:
    """Of the quickstart."""
    (summary,) = folder.glob("runs/*/summary.json")
    return RunDir(summary.parent)


def test_prepare_does_all_that_comes_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards, tokenizer and tokens; the second time all of them are there."""
    monkeypatch.setenv("RUNNER_CACHE", str(tmp_path / "cache"))
    spec = spec_of(*SMALL, "objective.take=200", f"objective.root={tmp_path}", "train.max_steps=1")
    out = io.StringIO()
    first, again = (fill_cache(spec, Progress(Console(file=out, width=200))) for _ in range(2))
    assert (first["from_cache"], again["from_cache"]) == (False, True) and first["num_tokens"] == again["num_tokens"]
    assert first["num_examples"] == manifest_of(tmp_path / "datasets/train/small")["lines"]
    assert (tmp_path / "artifacts/tokenizer/small/tokenizer.json").is_file()
    assert out.getvalue().count("there already") == 1


@pytest.mark.slow
def test_the_loss_falls_below_the_entropy_of_the_words_alone(quickstart: Path) -> None:
    from transformers import AutoTokenizer

    run = the_run(quickstart)
    tokenizer = AutoTokenizer.from_pretrained(run.path / "model")
    counts: Counter[int] = Counter()
    for line in lines_of(quickstart / "datasets/train/small"):
        counts.update([*tokenizer(line)["input_ids"], tokenizer.eos_token_id])
    total = sum(counts.values())
    entropy = -sum(n / total * math.log(n / total) for n in counts.values())
    measured = run.read("summary.json")["eval"]
    assert measured["before"]["loss"] == pytest.approx(math.log(384), abs=0.1)  # knows nothing
    assert measured["after"]["loss"] < entropy - 0.1
    assert measured["after"]["perplexity"] == pytest.approx(math.exp(measured["after"]["loss"]))


@pytest.mark.slow
def test_the_folders_are_the_seeds(quickstart: Path) -> None:
    train, val = quickstart / "datasets/train/small", quickstart / "datasets/val/small"
    for folder in (train, val):
        manifest = manifest_of(folder)
        assert manifest["complete"] and manifest["num_shards"] == len(manifest["shards"])
        for shard in manifest["shards"]:
            content = (folder / shard["file"]).read_bytes()
            assert (len(content), content.count(b"\n")) == (shard["bytes"], shard["lines"])
    assert manifest_of(train)["lines"] + manifest_of(val)["lines"] == 1500
    assert 0.03 < manifest_of(val)["lines"] / 1500 < 0.07
    bundle = quickstart / "artifacts/tokenizer/small"
    assert {file.name for file in bundle.iterdir()} == {"tokenizer.json", "tokenizer_config.json", "bundle.json"}
    assert json.loads((bundle / "bundle.json").read_text("utf-8"))["vocab_size"] == 384
    assert (quickstart / "hf_cache").is_dir()


@pytest.mark.slow
def test_the_model_is_a_plain_one_that_generates(quickstart: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = the_run(quickstart).path / "model"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.config.eos_token_id == tokenizer.eos_token_id
    ids = tokenizer("The value of the", return_tensors="pt")["input_ids"]
    new = model.generate(input_ids=ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert len(new) == 12 or new[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids[0]) == "The value of the"  # bytes and back


@pytest.mark.slow
def test_the_next_run_takes_what_is_there(quickstart: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in quickstart.glob("[da]*/**/*") if file.is_file()}
    done = run_cli(*SMALL, "train.max_steps=1", "run.output_dir=others", cwd=quickstart)
    assert done.returncode == 0, done.stderr
    out = " ".join(done.stdout.split())
    assert "there already" in out and "in the tokenizer that is there" in out and "tokens from the cache" in out
    assert before == {file: file.stat().st_mtime_ns for file in before}
    assert "there already" not in (quickstart / "out.txt").read_text("utf-8")


def test_another_corpus_is_refused_before_the_run_and_anew_makes_a_tokenizer_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("abc", "xyz"):
        letters = (" ".join((letter + name) * 3 for letter in name * 4) + f" {n}\n" for n in range(60))
        (tmp_path / f"{name}.txt").write_text("".join(letters))
    words = (*SMALL, "data=file", "data.path=abc.txt", "objective.take=null", "train.max_steps=1")
    progress = Progress(Console(file=io.StringIO()))
    fill_cache(spec_of(*words), progress)
    bundle = tmp_path / "artifacts" / "tokenizer" / "small" / "bundle.json"
    first = json.loads(bundle.read_text("utf-8"))
    spec_of(*words)
    other = tuple(word.replace("abc.txt", "xyz.txt") for word in words)
    with pytest.raises(RequestError) as caught:
        spec_of(*other)
    (problem,) = caught.value.problems
    assert problem.what == "datasets/train/small was made with another source (abc.txt, now xyz.txt)"
    assert "objective.shards=anew" in str(problem.remedy) and "objective.experiment=NAME" in str(problem.remedy)
    text = (tmp_path / "abc.txt").read_text()
    (tmp_path / "abc.txt").write_text(text + "one more\n")
    with pytest.raises(RequestError, match=r"abc\.txt: its files or the field that is read have changed"):
        spec_of(*words)
    (tmp_path / "abc.txt").write_text(text)
    fill_cache(spec_of(*other, "objective.shards=anew"), progress)
    second = json.loads(bundle.read_text("utf-8"))
    assert second["settings"]["fingerprint"] != first["settings"]["fingerprint"]
    spec_of(*other)
    bundle.write_text(json.dumps(first))  # shards were deleted and made of xyz.txt, its tokenizer stayed
    with pytest.raises(RequestError, match="tokenizer/small was trained on shards with another source"):
        spec_of(*other)


def test_missing_shards_stop_the_run_at_composition(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RequestError) as caught:
        spec_of("recipe=pretrain_2b", "objective.shards=reuse")
    (problem,) = caught.value.problems
    assert problem.what == "datasets/train/pretrain_2b holds no shards"
    assert problem.remedy == "write objective.shards=auto to make them"


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (("data=file", "data.path=nowhere.txt"), "there is no nowhere.txt"),
        (("method=lora",), "method=lora: a model from random weights trains whole"),
        (("objective.experiment=null",), "random weights need a tokenizer"),
        (("objective.tokenizer=nowhere",), "there is no nowhere/tokenizer.json"),
        (("objective=sft", "data=commands"), "objective=sft: a model from random weights"),
        (("data=commands",), "objective=pretrain needs plain text"),
    ],
)
def test_what_cannot_be_is_refused_at_composition(
    words: tuple[str, ...], what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    clean = ("~objective.experiment", "~objective.val_ratio", "~objective.lines_per_shard")
    with pytest.raises(RequestError) as caught:
        spec_of("recipe=pretrain_22m", *words, *(clean if "objective=sft" in words else ()))
    found = [problem for problem in caught.value.problems if what in problem.what]
    assert found and found[0].remedy, [problem.what for problem in caught.value.problems]


def test_pretraining_goes_on_from_a_pretrained_model_on_the_rows_as_they_are(tmp_path: Path) -> None:
    from tests.support import preferences

    rows = preferences.write(tmp_path / "text.jsonl", ({"text": row["chosen"]} for row in preferences.pairs(200)))
    finished, run = preferences.train(
        tmp_path, "objective=pretrain", "method=full", f"data.path={rows}", "train.packing=true", "train.max_steps=20",
        "train.max_length=32",
    )  # fmt: skip
    assert finished.summary["eval"]["after"]["loss"] < 0.8 * finished.summary["eval"]["before"]["loss"]
    assert not (tmp_path / "datasets").exists() and len(list(run.metrics())) == 20


def test_the_disk_plan_counts_shards_and_tokens_where_the_corpus_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside what `prepare` writes; a source of unknown size is named."""
    monkeypatch.setenv("RUNNER_CACHE", str(tmp_path / "cache"))
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(
        "".join(f"this is document number {n} of the corpus, and it says not much\n" for n in range(20_000))
    )
    words = (*SMALL, f"data.path={corpus}", f"objective.root={tmp_path}", "objective.take=null")
    before, on_a_pod = planned(*words), planned(*words, "where=runpod", "hw=a100")
    fill_cache(spec_of(*words), Progress(Console(file=io.StringIO())))
    shards = sum(manifest_of(tmp_path / "datasets" / part / "small")["bytes"] for part in ("train", "val"))
    assert before.disk["shards"] == pytest.approx(shards / 2**30, rel=0.02, abs=0.0006)
    assert on_a_pod.disk["shards"] == before.disk["shards"]
    assert (
        on_a_pod.disk["data"] == pytest.approx(corpus.stat().st_size / 2**30, abs=0.0006) and "data" not in before.disk
    )
    assert "shards" not in planned(*words).disk  # they are there
    assert before.disk["tokenised"] == pytest.approx(3 * before.disk["shards"], rel=0.01, abs=0.001)


def test_the_disk_plan_of_a_recipe_knows_its_corpus_or_says_so() -> None:
    plan = planned("recipe=pretrain_2b", "objective.experiment=none_yet")
    assert plan.disk["shards"] == pytest.approx(14_868_862 * 3434 / 2**30, rel=1e-3)
    assert plan.disk["tokenised"] == pytest.approx(12 * 14_868_862 * 673 / 2**30, rel=1e-3)
    assert plan.host_ram_gib < 20  # text is tokenised as a stream
    some = planned("recipe=pretrain_2b", "objective.experiment=none_yet", "objective.take=1000000")
    assert some.disk["shards"] == pytest.approx(1_000_000 * 3434 / 2**30, rel=1e-3)
    other = planned("recipe=pretrain_2b", "objective.experiment=none_yet", "data.subset=default", "where=runpod")
    assert "shards" not in other.disk
    (said,) = [note for note in other.notes if note.startswith("disk: ")]
    assert said.startswith("disk: how much text HuggingFaceFW/fineweb holds is not known: its shards and their tokens")
    assert said.endswith("(3 times as much) are not counted; make room for them with where.volume_gb=…")


def planned(*words: str) -> Plan:
    """The plan of the words."""
    return plan_inputs.plan(spec_of(*words), [])


def byte_pairs(file: Path, **more: object) -> Path:
    """A file of the library `tokenizers`: byte-level BPE over the reference pages, 300 tokens."""
    made = Tokenizer(BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False, **more)
    made.train_from_iterator(["some words and some more words"], trainer)
    file.parent.mkdir(parents=True, exist_ok=True)
    made.save(str(file))
    return file


@pytest.mark.parametrize("named", ["tok.json", "folder", "folder/tokenizer.json"])
def test_a_tokenizer_is_named_by_its_file_or_its_folder(
    named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RUNNER_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for file in ("tok.json", "folder/tokenizer.json"):
        byte_pairs(tmp_path / file, special_tokens=["<pad>", "</s>"])
    spec = spec_of(*SMALL, "objective.take=50", f"objective.tokenizer={named}", "train.max_steps=1")
    assert not (tmp_path / "cache/tokenizers").exists()  # a look changes nothing
    finished, run = train_here(spec)
    loaded = AutoTokenizer.from_pretrained(run.path / "model")
    assert (len(loaded), loaded.eos_token, loaded.pad_token) == (len(finished.tokenizer), "</s>", "<pad>")
    assert loaded.decode(loaded("some words")["input_ids"]) == "some words"
    files = (tmp_path / "cache/tokenised").glob("*/rows.arrow")
    rows = [row for file in files for row in Dataset.from_file(str(file))["input_ids"]]
    assert sum(row.count(loaded.eos_token_id) for row in rows) == 50  # documents, held-out ones included


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("{}", "tok.json is no tokenizer: "),
        ('{"zero_optimization": {"stage": 3}}', "tok.json is no tokenizer: "),
        ("not JSON", "tok.json is no tokenizer: "),
        ("none", "tok.json has no token that ends a text: none of <|endoftext|>, </s>, "),
        ("large", "tok.json has 300 tokens, more than model.vocab_size=100"),
    ],
)
def test_a_file_that_is_no_tokenizer_is_refused_by_the_front(
    content: str, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    special = {"none": ["<x>"], "large": ["</s>"]}.get(content)
    file = byte_pairs(tmp_path / "tok.json", special_tokens=special or [])
    if special is None:
        file.write_text(content)
    size = ("model.vocab_size=100",) if content == "large" else ()
    for place in ((), ("where=runpod", "hw=a100")):
        with pytest.raises(RequestError) as caught:
            spec_of("recipe=pretrain_22m", "objective.tokenizer=tok.json", *size, *place)
        (problem,) = caught.value.problems
        assert problem.what.startswith(what) or (
            content == "large" and "more than model.vocab_size=100" in problem.what
        )
        assert problem.remedy


def test_a_tokenizer_of_the_hub_is_opened_from_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the cache of the Hub, as no test reaches it; one that is not there is told under its key."""
    monkeypatch.setenv("RUNNER_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    opened = AutoTokenizer.from_pretrained
    folder = bundle_folder(byte_pairs(tmp_path / "tok.json", special_tokens=["</s>"]))

    def from_hub(name: str, **more: object) -> object:
        if name != "org/words":
            raise OSError(f"{name} is not a valid model identifier")
        return opened(folder)

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", from_hub)
    words = (*SMALL, "objective.take=50", f"objective.root={tmp_path}")
    facts = fill_cache(spec_of(*words, "objective.tokenizer=org/words"), Progress(Console(file=io.StringIO())))
    assert facts["num_tokens"] > 0 and not (tmp_path / "artifacts/tokenizer/small").exists()
    with pytest.raises(RequestError, match="the Hub has no model org/nothing") as caught:
        fill_cache(spec_of(*words, "objective.tokenizer=org/nothing"), Progress(Console(file=io.StringIO())))
    assert caught.value.problems[0].source == "objective.tokenizer"
    rented = spec_of("recipe=pretrain_22m", "objective.tokenizer=org/words", "where=runpod", "hw=a100")
    inputs.check_files(rented)  # nothing of this machine is missed
