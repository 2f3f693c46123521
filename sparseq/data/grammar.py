"""A synthetic English-German parallel corpus, drawn from a grammar written for this project.

A small lexicon is combined by rules that a dictionary cannot follow: agreement of article, adjective and noun in
gender, number and case, verb-second and verb-final word order, separable verbs, verbs and prepositions that govern a
case, relative pronouns, and pronouns whose German gender is that of the noun they refer to. A few English words
translate by context: *know* (kennen, wissen), *eat* (essen, fressen), *put* (stellen, legen), *when* (als, wenn,
wann) and *it* (er, sie, es). Meaning is kept plausible only roughly; grammar is what the corpus teaches.

`sparseq.data.lexicon` has the words, `sparseq.data.syntax` the sentence trees and their rendering in both languages;
here trees are drawn at random, reproducibly for a seed, and split so that part of the test set combines rules that
training keeps apart (`HELD_OUT_PAIRS`).
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from .lexicon import (
    ADJECTIVES,
    DETERMINERS,
    NOUNS,
    TIMES,
    VERBS,
    Adjective,
    Determiner,
    Noun,
    Time,
    Verb,
)
from .syntax import (
    PRONOUNS,
    WHAT,
    WHO,
    WHOM,
    Clause,
    Conjunction,
    Nominal,
    NounPhrase,
    Pair,
    PrepositionalPhrase,
    Pronoun,
    Tense,
    coordinate,
    pronoun_for,
    purpose,
    question,
    relative_gap,
    statement,
    subordinate,
    that_clause,
)

__all__ = [
    "HELD_OUT_PAIRS",
    "HELD_OUT_SHARE",
    "MAX_CORPUS_SIZE",
    "GrammarCorpus",
    "Pair",
    "generate_corpus",
    "is_held_out",
    "word_for_word",
    "write_corpus",
]

HELD_OUT_PAIRS: tuple[tuple[str, str], ...] = (
    ("fronted-place", "modal"),
    ("fronted-time", "reflexive"),
    ("dative-verb", "future"),
    ("genitive", "prepositional-verb"),
    ("question", "ditransitive"),
    ("because", "separable"),
    ("relative-clause", "placement"),
)
"""Pairs of rules that no training or validation sentence contains together (either rule alone does occur)."""

HELD_OUT_SHARE = 1 / 3
"""Share of the test set, rounded to whole sentences, in which a pair of `HELD_OUT_PAIRS` meets."""

MAX_CORPUS_SIZE = 500_000
"""Largest sum of the three sizes."""

MIN_WORDS, MAX_WORDS = 4, 25

_T = TypeVar("_T")


@dataclass(frozen=True)
class GrammarCorpus:
    """Three splits that share no sentence, in English or in German."""

    train: list[Pair]
    validation: list[Pair]
    test: list[Pair]


def is_held_out(pair: Pair) -> bool:
    """Whether two rules meet in this pair that `HELD_OUT_PAIRS` keeps apart in training."""
    return any(first in pair.rules and second in pair.rules for first, second in HELD_OUT_PAIRS)


@cache
def _nouns(tags: str) -> tuple[Noun, ...]:
    return tuple(noun for noun in NOUNS if any(tag in noun.tags for tag in tags))


@cache
def _adjectives(kind: str) -> tuple[Adjective, ...]:
    return tuple(adjective for adjective in ADJECTIVES if kind in adjective.kinds)


@cache
def _times(letter: str) -> tuple[Time, ...]:
    return tuple(time for time in TIMES if letter in time.tenses)


@cache
def _verbs(group: str, subject: str, object_tag: str) -> tuple[Verb, ...]:
    """Verbs of a group that take this kind of subject ("" for any) and an object with one of these tags."""
    return tuple(
        verb
        for verb in VERBS
        if _group(verb) == group
        and (not subject or subject in verb.subjects)
        and (not object_tag or any(tag in verb.objects for tag in object_tag))
    )


def _group(verb: Verb) -> str:
    return "separable" if verb.prefix and verb.frame == "acc" else "reflexive" if verb.reflexive else verb.frame


_ARTICLE_WEIGHTS: dict[bool, dict[str, float]] = {
    False: {"the": 9, "a": 5, "this": 2, "every": 1, "my": 1, "your": 1, "his": 1, "her": 1, "our": 1},
    True: {"the": 7, "": 3, "this": 2, "my": 1, "their": 1, "her": 1, "two": 1, "three": 1, "many": 1.5, "some": 1.5},
}
_DEFINITE_ARTICLES = ("the", "the", "the", "this", "my", "his", "our", "their")
_GROUP_WEIGHTS: dict[str, float] = {
    **{"acc": 10, "separable": 4, "dat": 4, "give": 5, "none": 3, "prep": 3, "reflexive": 3},
    **{"place": 2, "go": 3, "put": 3, "copula": 4},
}
_TENSE_WEIGHTS: dict[Tense, float] = {
    "present": 6,
    "past": 6,
    "future": 2,
    "can": 1,
    "must": 1,
    "want": 1,
    "should": 1,
    "like": 1,
}
_OPPOSITES = (
    *({"old", "young"}, {"old", "new"}, {"big", "small"}, {"beautiful", "ugly"}, {"strong", "weak"}, {"happy", "sad"}),
    *({"rich", "poor"}, {"cheap", "expensive"}, {"clean", "dirty"}, {"cold", "warm"}, {"brave", "angry"}),
    *({"friendly", "angry"}, {"happy", "angry"}, {"fresh", "old"}, {"empty", "quiet"}),
)
_LOCATIONS = (("in", "i"), ("in", "i"), ("in", "i"), ("on", "u"), ("behind", "oi"), ("next to", "to"), ("under", "u"))
_SEATS = (("on", "u"), ("on", "u"), ("in", "i"), ("under", "u"), ("behind", "to"), ("next to", "pto"))
_DIRECTIONS = (("into", "i"), ("into", "i"), ("onto", "u"), ("through", "i"), ("to", "p"), ("to", "i"))
_SHELVES = (("on", "u"), ("on", "u"), ("under", "u"), ("behind", "to"), ("next to", "to"), ("in front of", "to"))


class _Sampler:
    """Draws sentence trees; the only state is the random generator."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def pick(self, options: Sequence[_T]) -> _T:
        return options[int(self.rng.random() * len(options))]

    def weighted(self, weights: dict[_T, float]) -> _T:
        return self.rng.choices(list(weights), list(weights.values()))[0]

    def article(self, noun: Noun, plural: bool, definite: bool) -> Determiner:
        if definite:
            return DETERMINERS[self.pick(_DEFINITE_ARTICLES)]
        if noun.kind == "d":
            return DETERMINERS[self.pick(("", "", "", "the", "my"))]
        return DETERMINERS[self.weighted(_ARTICLE_WEIGHTS[plural])]

    def noun_phrase(
        self, tags: str, *, rich: bool = True, definite: bool = False, plural: bool | None = None
    ) -> NounPhrase:
        """A phrase whose noun has one of the tags; `rich` allows genitives and prepositional attributes."""
        noun = self.pick(_nouns(tags))
        plural = noun.kind != "d" and (self.chance(0.3) if plural is None else plural)
        article = self.article(noun, plural, definite)
        count = self.rng.choices((0, 1, 2), (5, 4, 1) if rich else (7, 3, 0))[0]
        adjectives = self.adjectives(noun.kind, count)
        phrase = NounPhrase(noun, article, plural, adjectives)
        if rich and noun.kind in "pat" and self.chance(0.1):
            owner = self.noun_phrase("p", rich=False, definite=True)
            return replace(phrase, determiner=DETERMINERS["the"], possessor=owner)
        if rich and noun.kind == "p" and self.chance(0.08):
            return replace(phrase, attachment=self.phrase((("with", "c"), ("without", "c"), ("from", "i"))))
        return phrase

    def adjectives(self, kind: str, count: int) -> tuple[Adjective, ...]:
        drawn = tuple(self.rng.sample(_adjectives(kind), count))
        return drawn[:1] if {adjective.english for adjective in drawn} in _OPPOSITES else drawn

    def phrase(self, kinds: Sequence[tuple[str, str]], *, direction: bool = False) -> PrepositionalPhrase:
        preposition, tags = self.pick(kinds)
        inner = self.noun_phrase(tags, rich=False)
        if inner.determiner.singular == "every":
            inner = replace(inner, determiner=DETERMINERS["the"])
        return PrepositionalPhrase(preposition, inner, direction)

    def pronoun(self, other: Nominal | None = None) -> Pronoun:
        """A personal pronoun, as an object not the same person as the subject `other`."""
        same = {"I": "I we", "we": "I we", "you": "you"}.get(other.english(True) if other else "", "")
        return PRONOUNS[self.pick([name for name in PRONOUNS if name not in same.split()])]

    def relative(self, head: NounPhrase) -> NounPhrase:
        """Add a relative clause to a phrase, about its noun as the subject or as an object."""
        kind = head.noun.kind
        if head.attachment or kind not in "paft":
            return head
        if self.chance(0.5 if kind in "pa" else 0.2):
            gap = relative_gap(head, subject=True)
            group = (
                self.pick(("acc", "acc", "separable", "dat", "none", "prep", "copula")) if kind in "pa" else "copula"
            )
            clause = self.clause(subject=gap, kind=kind, group=group, simple=True)
        else:
            gap = relative_gap(head, subject=False)
            groups = {"t": ("acc", "acc", "acc", "prep"), "f": ("acc",)}.get(kind, ("acc", "acc", "prep", "dat"))
            clause = self.clause(object=gap, kind="p", tags=head.noun.tags, group=self.pick(groups), simple=True)
        return replace(head, relative=clause)

    def clause(
        self,
        *,
        subject: Nominal | None = None,
        object: Nominal | None = None,
        kind: str = "",
        tags: str = "",
        group: str = "",
        tense: Tense | None = None,
        simple: bool = False,
        plain: bool = False,
    ) -> Clause:
        """A clause with the parts that are not given drawn at random.

        Args:
            subject: the subject, of semantic kind `kind`; drawn if None.
            object: the object, a noun with `tags`; drawn if None.
            kind: what the subject must be, p or a; "" for either.
            group: verb group; drawn if empty.
            tense: drawn if None.
            simple: short phrases and no adverbials, as inside other clauses.
            plain: no relative clause, nothing fronted: what subordinate clauses and questions take.
        """
        group = group or self.weighted(_GROUP_WEIGHTS)
        verb = None if group == "copula" else self.pick(_verbs(group, kind, tags))
        drawn: Tense = self.weighted(_TENSE_WEIGHTS) if tense is None else tense
        if verb is None and drawn not in ("present", "past", "future"):
            drawn = "present"
        negated = drawn not in ("must", "like") and self.chance(0.06 if simple else 0.15)
        clause = Clause(PRONOUNS["he"], verb, tense=drawn, negated=negated)
        clause = self._with_subject(clause, subject, kind, rich=not simple)
        if verb and verb.english == verb.past and drawn == "present" and clause.subject.person != 2:
            # Present and past of "I read" look alike in English, not in German: draw again.
            options: dict[str, Any] = {"subject": subject, "object": object, "kind": kind, "tags": tags}
            return self.clause(**options, group="acc", tense=drawn, simple=simple, plain=plain)
        clause = self._with_objects(clause, object, rich=not simple)
        if not simple:
            clause = self._with_adverbials(clause, plain)
        return clause

    def _with_subject(self, clause: Clause, subject: Nominal | None, kind: str, rich: bool) -> Clause:
        tags = kind or (clause.verb.subjects if clause.verb else "paot")
        if subject is None:
            is_pronoun = "p" in tags and self.chance(0.22)
            subject = self.pronoun() if is_pronoun else self.noun_phrase(tags, rich=rich, definite=clause.negated)
            if isinstance(subject, NounPhrase) and not clause.negated and clause.tense != "must" and self.chance(0.03):
                subject = replace(subject, determiner=DETERMINERS["no"], possessor=None)
        if clause.verb is None:
            noun_kind = subject.noun.kind if isinstance(subject, NounPhrase) else kind or "p"
            return replace(clause, subject=subject, predicate=self.pick(_adjectives(noun_kind)))
        return replace(clause, subject=subject)

    def _with_objects(self, clause: Clause, object: Nominal | None, rich: bool) -> Clause:
        verb = clause.verb
        if verb is None:
            return clause
        recipient: Nominal | None = None
        if verb.frame == "give":
            recipient = self.pronoun(clause.subject) if self.chance(0.25) else self._dative(rich, "p", clause.negated)
        if object is None and verb.frame in ("acc", "dat", "give", "prep", "put"):
            definite = clause.negated and (verb.case == "dat" or verb.preposition != "" or self.chance(0.5))
            if "p" in verb.objects and verb.frame != "give" and self.chance(0.12):
                object = self.pronoun(clause.subject)
            elif verb.frame == "dat":
                object = self._dative(rich, verb.objects, definite)
            else:
                object = self.noun_phrase(verb.objects, rich=rich, definite=definite)
                if clause.negated and not definite and not object.possessor:
                    # What German negates with kein.
                    article = "" if object.plural or object.noun.kind == "d" else "a"
                    object = replace(object, determiner=DETERMINERS[article])
        phrase = None
        if verb.frame in ("place", "go", "put"):
            places = {"place": _SEATS, "go": _DIRECTIONS, "put": _SHELVES}[verb.frame]
            phrase = self.phrase(places, direction=verb.frame != "place")
        to_recipient = recipient is not None and self.chance(0.5)
        return replace(clause, object=object, recipient=recipient, to_recipient=to_recipient, phrase=phrase)

    def _dative(self, rich: bool, tags: str, definite: bool) -> NounPhrase:
        """A phrase whose article shows the case: a bare German dative plural is hard to tell from an accusative."""
        phrase = self.noun_phrase(tags, rich=rich, definite=definite)
        return replace(phrase, determiner=DETERMINERS["some"]) if phrase.determiner.pattern == "bare" else phrase

    def _with_adverbials(self, clause: Clause, plain: bool) -> Clause:
        frame = clause.verb.frame if clause.verb else "copula"
        if not plain and isinstance(clause.subject, NounPhrase) and self.chance(0.13):
            clause = replace(clause, subject=self.relative(clause.subject))
        elif (
            not plain
            and isinstance(clause.object, NounPhrase)
            and frame in ("acc", "dat", "prep")
            and self.chance(0.18)
        ):
            # Nothing may follow a relative clause that could belong to it.
            clause = replace(clause, object=self.relative(clause.object))
            return self._with_time(clause, always_fronted=True)
        if frame in ("acc", "none", "prep", "give") and self.chance(0.3):
            clause = replace(clause, phrase=self.phrase(_LOCATIONS))
        if not plain and clause.phrase and frame not in ("go", "put") and self.chance(0.4):
            return self._with_time(replace(clause, front="place"))
        return self._with_time(clause, never_fronted=plain)

    def _with_time(self, clause: Clause, *, always_fronted: bool = False, never_fronted: bool = False) -> Clause:
        if not self.chance(0.45):
            return clause
        letter = {"past": "p", "present": "n", "like": "n"}.get(clause.tense, "f")
        options = [time for time in _times(letter) if not (clause.negated and time.english == "every day")]
        if clause.tense == "like":
            options = [time for time in options if time.english not in ("now", "today")]
        fronted = always_fronted or (not never_fronted and not clause.front and self.chance(0.45))
        return replace(clause, time=self.pick(options), front="time" if fronted else clause.front)

    def question(self) -> Pair:
        style = self.pick(("yes-no", "yes-no", "where", "when", "who", "whom", "what"))
        group = self.pick(("acc", "acc", "separable", "dat", "give", "none", "prep", "reflexive"))
        if style == "who":
            clause = self.clause(subject=WHO, kind="p", group=group, plain=True)
        elif style == "whom":
            group = self.pick(("acc", "acc", "separable", "dat", "prep"))
            clause = self.clause(object=WHOM, tags="p", group=group, plain=True)
        elif style == "what":
            clause = self.clause(object=WHAT, kind="p", tags="tf", group=self.pick(("acc", "give", "separable")))
            clause = replace(clause, subject=_without_relative(clause.subject), front=None, to_recipient=True)
            clause = clause if clause.recipient else replace(clause, to_recipient=False)
        else:
            group = group if style != "yes-no" or self.chance(0.7) else self.pick(("go", "place", "put", "copula"))
            clause = self.clause(group=group, plain=True)
        clause = replace(clause, negated=False)
        if style == "where":
            clause = replace(clause, phrase=None, wh="where")
        elif style == "when":
            clause = replace(clause, time=None, wh="when")
        return question(clause)

    def subordinate(self) -> Pair:
        conjunction: Conjunction = self.pick(
            ("because", "because", "although", "if", "when", "when", "before", "while")
        )
        tense: Tense | None = "present" if conjunction == "if" or self.chance(0.3) else "past"
        main_tense = tense
        if conjunction in ("because", "although"):
            tense = main_tense = None
        elif tense == "present" and conjunction in ("if", "when"):
            main_tense = self.pick(("present", "future", "can", "must", "want", "should"))
        simple = self.pick(("main", "clause", "both", "neither"))
        main = self.clause(tense=main_tense, plain=True, simple=simple in ("main", "both"))
        clause = self.clause(tense=tense, plain=True, simple=simple in ("clause", "both"))
        return subordinate(main, conjunction, clause, fronted=self.chance(0.4))

    def that_clause(self) -> Pair:
        main = self.clause(group="that", kind="p", tense=self.pick(("present", "present", "past")), simple=True)
        return that_clause(main, self.clause(plain=True, simple=self.chance(0.3)))

    def coordinate(self) -> Pair:
        left = self.clause(simple=self.chance(0.7), plain=True)
        right = self.clause(simple=self.chance(0.7), plain=True)
        return coordinate(left, self.pick(("and", "but")), right)

    def purpose(self) -> Pair:
        kind = self.pick("ppa")
        main = self.clause(group="go", kind=kind, plain=True)
        aim = self.clause(group=self.pick(("acc", "acc", "separable", "dat")), kind=kind, simple=True)
        while main.negated or main.tense == "like" or isinstance(aim.object, Pronoun):
            main = self.clause(group="go", kind=kind, plain=True)
            aim = self.clause(group="acc", kind=kind, simple=True)
        return purpose(main, aim)

    def antecedent(self) -> Pair:
        """Two clauses, the second with *it* or *they* for the only thing or animal of the first."""
        thing = self.noun_phrase("taf", rich=False, definite=True, plural=self.chance(0.2))
        thing = replace(thing, determiner=self.pick((DETERMINERS["the"], DETERMINERS["this"], thing.determiner)))
        it, kind = pronoun_for(thing), thing.noun.kind
        tense: Tense = self.pick(("present", "past"))
        acting = self.clause(object=thing, kind="p", tags=thing.noun.tags, group="acc", tense=tense, simple=True)
        described = Clause(it, None, predicate=self.pick(_adjectives(kind)), tense=tense)
        style = self.pick(("reason", "reason", "condition", "also"))
        if style == "reason":
            conjunction: Conjunction = self.pick(("because", "although"))
            return subordinate(self._with_time(acting), conjunction, described, fronted=False)
        if style == "condition":
            acting = self.clause(object=it, kind="p", tags=thing.noun.tags, group="acc", tense=tense, simple=True)
            opening = replace(described, subject=thing)
            return subordinate(
                acting, self.pick(("if", "when") if tense == "present" else ("when",)), opening, fronted=True
            )
        second = self.clause(object=it, kind="p", tags=thing.noun.tags, group="acc", simple=True)
        return coordinate(self._with_time(acting, never_fronted=True), self.pick(("and", "but")), second)

    def statement(self) -> Pair:
        return statement(self.clause())

    def sentence(self) -> Pair:
        makers = {
            self.statement: 34.0,
            self.question: 14.0,
            self.subordinate: 16.0,
            self.that_clause: 9.0,
            self.coordinate: 6.0,
            self.purpose: 7.0,
            self.antecedent: 14.0,
        }
        return self.weighted(makers)()


def _without_relative(part: Nominal) -> Nominal:
    return replace(part, relative=None) if isinstance(part, NounPhrase) else part


def _check_sizes(sizes: dict[str, int]) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"`{name}` must be at least 1, but is {size}; ask for one sentence or more")
    total = sum(sizes.values())
    if total > MAX_CORPUS_SIZE:
        raise ValueError(
            f"`train_size` + `validation_size` + `test_size` is {total}, above the limit of {MAX_CORPUS_SIZE} "
            "distinct sentences; ask for a smaller `train_size`"
        )


def generate_corpus(
    *, train_size: int = 50_000, validation_size: int = 500, test_size: int = 1_000, seed: int = 0
) -> GrammarCorpus:
    """Draw a corpus; the same arguments give the same sentences in every process.

    No English and no German sentence occurs twice. `HELD_OUT_SHARE` of the test set, its last part, satisfies
    `is_held_out`; no other sentence of the corpus does.

    Args:
        train_size, validation_size, test_size: number of pairs in each split.
        seed: seed of the draw.

    Raises:
        ValueError: a size is below 1, or their sum above `MAX_CORPUS_SIZE`.
    """
    _check_sizes({"train_size": train_size, "validation_size": validation_size, "test_size": test_size})
    sampler = _Sampler(random.Random(seed))
    held_out_size = round(test_size * HELD_OUT_SHARE)
    seen_size = test_size - held_out_size + validation_size + train_size
    seen: list[Pair] = []
    held_out: list[Pair] = []
    used: set[str] = set()
    while len(seen) < seen_size or len(held_out) < held_out_size:
        pair = sampler.sentence()
        pool, size = (held_out, held_out_size) if is_held_out(pair) else (seen, seen_size)
        fits = MIN_WORDS <= len(pair.source.split()) <= MAX_WORDS
        if len(pool) < size and fits and pair.source not in used and pair.target not in used:
            used.update((pair.source, pair.target))
            pool.append(pair)
    train_start = seen_size - train_size
    test = seen[: test_size - held_out_size] + held_out
    return GrammarCorpus(seen[train_start:], seen[test_size - held_out_size : train_start], test)


# English and its commonest German form, in turn.
_FUNCTION_WORDS = """
the der a ein an ein this dieser these diese every jeder no kein my mein your dein his sein her ihr our unser their ihr
two zwei three drei many viele some einige i ich you du he er she sie we wir they sie it er me mich him ihn us uns
them sie who der whom wen what was where wo when als that dass and und but aber because weil although obwohl if wenn
before bevor while während order um not nicht does tut do tun did tat will wird can kann cannot kann must muss
should soll wants will want wollen likes mag like mögen is ist are sind am bin was war were waren be sein in in
into in on auf onto auf under unter behind hinter next neben front vor through durch to zu from aus with mit
without ohne for für of von at an up auf off aus about über along mit yesterday gestern last letzte week Woche
year Jahr morning Morgen today heute now jetzt day Tag monday Montag sunday Sonntag evening Abend night Nacht
tomorrow morgen soon bald
"""


@cache
def _dictionary() -> dict[str, str]:
    """One German form for each English word: nominatives, er forms, participles, adjectives in their commonest -en."""
    listed = _FUNCTION_WORDS.split()
    words = dict(zip(listed[::2], listed[1::2], strict=True))
    for noun in NOUNS:
        words |= {noun.singular: noun.german, noun.plural: noun.german_plural}
    for adjective in ADJECTIVES:
        words[adjective.english] = adjective.stem + "en"
    for verb in VERBS:
        forms = (verb.english, verb.prefix + verb.infinitive), (verb.past, verb.participle)
        for english, german in (*forms, (verb.english_present(2), verb.prefix + verb.german_present(2))):
            words.setdefault(english.split()[0], german)
    return words


def word_for_word(source: str) -> str:
    """Translate with a dictionary alone: each English word by one German form, the order unchanged."""

    def translate(match: re.Match[str]) -> str:
        word = match.group()
        return _dictionary().get(word.lower(), word)

    german = re.sub(r"[A-Za-z]+", translate, source)
    return german[:1].upper() + german[1:]


def write_corpus(corpus: GrammarCorpus, folder: str | Path) -> None:
    """Write `{train,val,test}.{en,de}`, one sentence a line, UTF-8; the folder is made if absent."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for split, pairs in (("train", corpus.train), ("val", corpus.validation), ("test", corpus.test)):
        for language, lines in (("en", [p.source for p in pairs]), ("de", [p.target for p in pairs])):
            text = "".join(f"{line}\n" for line in lines)
            (folder / f"{split}.{language}").write_text(text, encoding="utf-8", newline="\n")
