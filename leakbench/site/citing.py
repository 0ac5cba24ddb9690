"""BibTeX of what entries say of their papers: only fields that the reference holds, and nothing guessed."""

from __future__ import annotations

import re

_WORK = re.compile(r'^(?P<authors>[^"]+?),\s*"(?P<title>[^"]+?),?"(?:,\s*|\s+|$)(?P<rest>.*)$', re.S)
_YEAR = re.compile(r"\b(?:19|20)\d\d\b(?!\.\d)")
_REST = re.compile(
    r"^(?P<venue>(?!arXiv\b|doi\b)[^,;(]*)?,?\s*(?:arXiv[: ]\s*(?P<arxiv>\d{4}\.\d{4,5}))?,?\s*"
    r"(?:doi[: ]\s*(?P<doi>10\.\d{4,9}/[^\s,;]+))?"
)
_SPECIAL = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}


def bibtex_of(kind: str, name: str, reference: str) -> str:
    """Return a BibTeX entry per work of a reference; of one that cannot be taken apart, an entry with it as note.

    Args:
        kind: ``attack`` or ``defense``.
        name: Of the entry; it makes the keys.
        reference: ``authors, "title", venue year, arXiv id``, works separated by semicolons; empty or ``none`` gives
            nothing.
    """
    text = " ".join(reference.split())
    if not text or text.lower().startswith("none"):
        return ""
    works = [work for part in re.split(r";\s+", text) if (work := _fields(part))] or [{"note": _plain(text)}]
    key = re.sub(r"[^A-Za-z0-9_]", "_", f"{kind}_{name}")
    return "\n".join(_entry(key if i == 0 else f"{key}_{i + 1}", fields) for i, fields in enumerate(works))


def _fields(work: str) -> dict[str, str] | None:
    match = _WORK.match(work.strip())
    if match is None:
        return None
    # Words before the first name, with or without a colon, say what the work is for.
    who = re.sub(r"^(?:after|as|for|in|with)\b[^A-Z]*", "", match["authors"].rpartition(": ")[2])
    authors = [name for name in re.split(r",\s*|\s+and\s+", who) if name]
    # What follows further on, say of a work that this one rests on, is not of this one.
    told = _REST.match(match["rest"])
    venue = (told["venue"] or "").strip(" ,.") if told else ""
    fields = {"author": _names(authors), "title": "{" + _plain(match["title"]) + "}"}
    if year := _YEAR.search(venue):
        fields["year"] = year[0]
    if venue := _YEAR.sub("", venue).strip(" ,."):
        fields["howpublished"] = _plain(" ".join(venue.split()))
    if told and told["arxiv"]:
        fields |= {"eprint": told["arxiv"], "archiveprefix": "arXiv"}
    if told and told["doi"]:
        fields["doi"] = told["doi"].rstrip(".")
    return fields


def _names(authors: list[str]) -> str:
    """Join names; those of several words are kept whole, since references have family names only."""
    names = []
    for author in authors:
        others = author.endswith(" et al.")
        name = _plain(author.removesuffix(" et al."))
        names += [f"{{{name}}}" if " " in name else name, *(["others"] if others else [])]
    return " and ".join(names)


def _plain(text: str) -> str:
    """Return a text that BibTeX reads as it is."""
    text = "".join(_SPECIAL.get(letter, letter) for letter in re.sub(r"[{}]", "", text))
    return re.sub(r"(?<!\\)([&%$#_])", r"\\\1", text)


def _entry(key: str, fields: dict[str, str]) -> str:
    lines = [f"  {name:<13} = {{{value}}}," for name, value in fields.items()]
    return "\n".join([f"@misc{{{key},", *lines, "}"]) + "\n"
