"""The bundled `commands` data set: plain English → this runner's own command line.

    "Fine-tune Mistral with 4-bit QLoRA on three H100s."
    → python -m runner model=mistral7b method=qlora4 hw=h100x3

The models, the hardware and their names come from `conf/`; only the sentences stand here. The
same catalogue gives the same rows, on every machine.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypedDict, TypeVar

from runner.config import conf_files

T = TypeVar("T")

SEED = 7
MAX_WORDS = 20  # a laptop trains on about 450 tokens a second: 600 short rows take two minutes
# The title and one alias: with all of them (6 to 10 sentences a name) SmolLM2-135M, after 55k tokens,
# gets 38 of 40 held-out questions right, but 12 of 200 others wrong, mostly in a name.
NAMES_PER_CHOICE = 2
MIN_USES = 8  # sentences a name; a catalogue too large for it leaves aliases unsaid
SHARE_WITHOUT_HW = 0.3  # with 0.2 the model adds hardware that nobody asked for
SHARE_CARELESS = 0.08  # all lower case, without a full stop


class Row(TypedDict):
    """One example."""

    prompt: str
    completion: str


# conf/method holds no names for people: the rows speak of these methods, and of no other.
METHODS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "full": (("full fine-tuning", "full training"), ("all weights of", "every weight of")),
    "freeze": (("layer freezing", "partial freezing"), ("the last layers of", "only the last layers of")),
    "lora": (("LoRA", "plain LoRA"), ("a LoRA adapter for", "a plain LoRA for")),
    "qlora4": (("4-bit QLoRA", "QLoRA in 4 bits"), ("a 4-bit QLoRA adapter for", "a 4-bit QLoRA for")),
    "qlora8": (("8-bit QLoRA", "QLoRA in 8 bits"), ("an 8-bit QLoRA adapter for", "an 8-bit QLoRA for")),
}
"""How people speak of a method: "with …", and "train … Mistral"."""

# {on} is "on three H100s" or nothing; a sentence with {On} or {hw} needs hardware. {means} and
# {object} are the two ways to name a method.
TEMPLATES = (
    "Fine-tune {model} with {means} {on}.",
    "Train {model} with {means} {on}.",
    "Finetune {model} using {means} {on}.",
    "Tune {model} {on} with {means}.",
    "Please fine-tune {model} {on} using {means}.",
    "Please train {model} with {means} {on}.",
    "Can you fine-tune {model} with {means} {on}?",
    "Could you train {model} {on} with {means}?",
    "Would you please tune {model} using {means} {on}?",
    "How do I fine-tune {model} with {means} {on}?",
    "How can I train {model} using {means} {on}?",
    "How would one tune {model} {on} with {means}?",
    "What do I type to fine-tune {model} with {means} {on}?",
    "Which command trains {model} {on} using {means}?",
    "I want to fine-tune {model} with {means} {on}.",
    "I would like to train {model} {on} with {means}.",
    "I'd like to tune {model} with {means} {on}.",
    "We need {model} trained {on} using {means}.",
    "Let's fine-tune {model} {on} with {means}.",
    "Give me the command for {means} with {model} {on}.",
    "Show me how to tune {model} {on} with {means}.",
    "Use {means} to fine-tune {model} {on}.",
    "Use {means} {on} to train {model}.",
    "Apply {means} to {model} {on}.",
    "Run {means} {on} for {model}.",
    "Start {means} for {model} {on}.",
    "Set up {means} {on} for {model}, please.",
    "{means} for {model} {on}, please.",
    "With {means}, train {model} {on}.",
    "{On}, fine-tune {model} with {means}.",
    "{On}, train {model} using {means}.",
    "{model}, {means}, {hw}.",
    "{hw}: {means} for {model}.",
    "Train {object} {model} {on}.",
    "Please train {object} {model} {on}.",
    "Can you train {object} {model} {on}?",
    "How do I train {object} {model} {on}?",
    "I want to train {object} {model} {on}.",
    "What is the command to train {object} {model} {on}?",
    "{On}, train {object} {model}.",
)


def examples(count_train: int = 600, count_eval: int = 40) -> tuple[list[Row], list[Row]]:
    """Training and held-out rows; the same numbers give the same rows.

    No sentence is in both. Held-out rows ask for combinations that training does not show, but
    with names of models, hardware and methods that it does. Raises ValueError where the
    catalogue is too small for so many different sentences.
    """
    drawn = _draw(count_train + count_eval, random.Random(SEED))
    held = _hold_out(drawn, count_eval)
    train = [question for question in drawn if question not in held]
    return [_row(question) for question in train], [_row(question) for question in held]


@dataclass(frozen=True, eq=False)  # no sentence comes twice; comparing their fields took 57 ms of a plan
class _Question:
    sentence: str
    choices: tuple[str, ...]
    """The overrides, such as `model=phi2`."""
    names: tuple[str, ...]
    """The names that were used for them."""


def _row(question: _Question) -> Row:
    return {"prompt": question.sentence, "completion": " ".join(("python -m runner", *question.choices))}


class _Deck(Generic[T]):
    """Cards drawn evenly: all of them once, then all of them again in a new order."""

    def __init__(self, cards: Iterable[T], rng: random.Random) -> None:
        self._cards = list(cards)
        self._rng = rng
        self._left: list[T] = []

    def draw(self) -> T:
        if not self._left:
            self._left = list(self._cards)
            self._rng.shuffle(self._left)
        return self._left.pop()


def _draw(count: int, rng: random.Random) -> list[_Question]:
    """`count` questions, no sentence twice, every name about equally often."""
    models = _Deck(spoken_models(count), rng)
    with_hw = spoken_hardware(round(count * (1 - SHARE_WITHOUT_HW)))
    without = round(len(with_hw) * SHARE_WITHOUT_HW / (1 - SHARE_WITHOUT_HW)) or 1
    hardware = _Deck([*with_hw, *[("", "")] * without], rng)
    spoken = [method for method in conf_files.options("method") if method in METHODS]
    methods = _Deck(spoken, rng)
    templates = _Deck(TEMPLATES, rng)
    phrases = {(method, kind): _Deck(METHODS[method][kind], rng) for method in spoken for kind in (0, 1)}
    questions: dict[str, _Question] = {}
    for _ in range(20 * count):
        if len(questions) == count:
            break
        (model, model_said), (hw, hw_said), method = models.draw(), hardware.draw(), methods.draw()
        for _ in TEMPLATES:
            template = templates.draw()
            if not hw and ("{hw}" in template or "{On}" in template):
                continue
            phrase = phrases[method, int("{object}" in template)].draw()
            sentence = _sentence(template, model_said, phrase, hw_said, rng.random() < SHARE_CARELESS)
            if key_of(sentence) not in questions and len(sentence.split()) <= MAX_WORDS:
                choices = (f"model={model}", f"method={method}", *([f"hw={hw}"] if hw else []))
                names = (model_said, phrase, *([hw_said] if hw else []))
                questions[key_of(sentence)] = _Question(sentence, choices, names)
                break
    if len(questions) < count:
        raise ValueError(f"the catalogue gives {len(questions)} different sentences, not {count}")
    return list(questions.values())


def _sentence(template: str, model: str, phrase: str, hw: str, careless: bool) -> str:
    on = f"on {hw}" if hw else ""
    slots = {"model": model, "means": phrase, "object": phrase, "on": on, "On": on, "hw": hw}
    sentence = re.sub(r"\s+([.,?])", r"\1", " ".join(template.format(**slots).split()))
    if careless:
        return sentence.lower().rstrip(".?")
    return sentence[0].upper() + sentence[1:]


def key_of(sentence: str) -> str:
    """Return the sentence without differences of case, spaces and final full stop."""
    return " ".join(sentence.casefold().split()).rstrip(".?")


def _hold_out(drawn: Sequence[_Question], count: int) -> list[_Question]:
    """The `count` questions that are most unlike each other, and whose names stay in training."""
    uses = Counter(name for question in drawn for name in question.names)
    combinations = Counter(question.choices for question in drawn)
    asked: Counter[str] = Counter()
    held: list[_Question] = []
    left = list(drawn)
    while len(held) < count:
        fit = [q for q in left if all(uses[name] > 1 for name in q.names)]
        if not fit:
            raise ValueError(f"the catalogue gives {len(held)} held-out questions, not {count}")
        best = min(fit, key=lambda q: (combinations[q.choices] > 1, sum(asked[c] for c in q.choices)))
        held.append(best)
        left.remove(best)
        uses.subtract(best.names)
        combinations.subtract([best.choices])
        asked.update(best.choices)
    return held


def spoken_models(count: int) -> list[tuple[str, str]]:
    """(choice, name) of every model that has aliases and that its name alone makes loadable, for `count` sentences.

    As with hardware, a model that is added without aliases leaves the demo's rows as they are.
    """
    names = {
        choice: (values.get("title") or choice, *values["aliases"])
        for choice in conf_files.options("model")
        if "id" in (values := conf_files.load_choice("model", choice))  # hub: needs a model.id beside it
        and values.get("aliases")
        and not values.get("from_scratch")  # nothing to fine-tune
    }
    return _spoken(names, count)


def spoken_hardware(count: int) -> list[tuple[str, str]]:
    """(choice, name) of the hardware that has aliases but `local`, which is what a command without `hw=` means.

    Without aliases a profile is not spoken of: a GPU that is added then leaves the demo's rows, and what was measured
    on them, as they are.
    """
    names = {}
    for choice in conf_files.options("hw"):
        values = conf_files.load_choice("hw", choice)
        if values["accelerator"] != "detect" and values.get("aliases"):
            said = (values.get("title") or choice, *values["aliases"])
            names[choice] = tuple(_with_article(name, values) for name in said)
    return _spoken(names, count)


def _spoken(names: dict[str, tuple[str, ...]], count: int) -> list[tuple[str, str]]:
    """Pairs of choice and name, for `count` sentences; a name that two choices share is left out.

    Every choice is called by its first name, and as many by a second as get `MIN_USES` sentences.
    """
    owners: dict[str, set[str]] = {}
    for choice, said in names.items():
        for name in said:
            owners.setdefault(key_of(name), set()).add(choice)
    clear: dict[str, list[str]] = {}
    for choice, said in names.items():
        first_spelling = {key_of(name): name for name in reversed(said)}
        clear[choice] = [first_spelling[k] for k in dict.fromkeys(map(key_of, said)) if len(owners[k]) == 1]
    pairs = [(choice, rank) for choice in clear for rank in range(len(clear[choice][:NAMES_PER_CHOICE]))]
    ranked = sorted(pairs, key=lambda pair: pair[1])
    room = max(count // MIN_USES, len(clear))
    return [(choice, clear[choice][rank]) for choice, rank in sorted(ranked[:room])]


_COUNTED = re.compile(r"\d|(a|an|the|this|my|one|two|three|four|five|six|seven|eight|dual) ", re.IGNORECASE)
_SOUNDS_LIKE_A_VOWEL = re.compile(r"[AEIOUaeiou]|[FHLMNRSX](?![a-z])")  # an A100, an RTX, an H100


def _with_article(name: str, values: dict[str, object]) -> str:
    """`an RTX 4090` and `the CPU`; `three H100s` and `3x H100` stay as they are."""
    if _COUNTED.match(name):
        return name
    if values["accelerator"] == "cpu":
        return f"the {name}"
    if values.get("num_gpus", 1) != 1 or values.get("num_nodes", 1) != 1:
        return name
    return f"{'an' if _SOUNDS_LIKE_A_VOWEL.match(name) else 'a'} {name}"
