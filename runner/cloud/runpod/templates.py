"""RunPod's templates: those of the account and the public ones, searched by name. The API has no search of its own."""

from __future__ import annotations

from runner.cloud.runpod.api import Api
from runner.config.suggestions import nearest
from runner.errors import Problem, RequestError

SOURCES = ("official", "verified", "community")


def search(api: Api, text: str = "") -> list[dict[str, str]]:
    """Templates for pods that have every word of `text` in their name, image or id: the account's own first."""
    found = [{**template, "source": "own"} for template in api.templates()]
    for source in SOURCES:
        found += [{**template, "source": source} for template in api.public_templates(source)]
    words = text.lower().split()
    rows: dict[str, dict[str, str]] = {}
    for template in found:
        row = {key: str(template.get(key) or "") for key in ("id", "name", "image", "category", "source")}
        said = f"{row['name']} {row['image']} {row['id']}".lower()
        if not template.get("serverless") and all(word in said for word in words):
            rows.setdefault(row["id"], row)
    return list(rows.values())


def find_template(api: Api, word: str) -> str:
    """The id of the template named by id or exact name; RequestError for none, several, or a serverless one."""
    source = f"where.template={word}"
    template = api.template(word)
    if template is not None and template.get("serverless"):
        what = f"template {word} ({template.get('name')}) is for serverless workers, and no pod can be made of it"
        raise RequestError(Problem(what, source, "python -m runner pods templates lists those for pods"))
    if template is not None:
        return word
    rows = search(api)
    named = [row["id"] for row in rows if row["name"].lower() == word.lower()]
    if len(named) == 1:
        return named[0]
    if named:
        what = f"{len(named)} templates have the name {word}"
        raise RequestError(Problem(what, source, f"name one by its id: {' or '.join(named)}"))
    near = nearest(word, {text: row["id"] for row in rows for text in (row["name"], row["id"])})
    remedy = f"did you mean {near}?" if near else "python -m runner pods templates TEXT searches them"
    raise RequestError(Problem(f"RunPod has no template {word} that this key may use", source, remedy))
