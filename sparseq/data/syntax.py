"""Sentence trees of the synthetic corpus, each rendered in English and in German.

Phrases are `NounPhrase`, `Pronoun`, `PrepositionalPhrase` and `Clause`; `statement`, `question`, `subordinate`,
`that_clause`, `coordinate` and `purpose` make a `Pair` of sentences of them:

    >>> from sparseq.data.lexicon import time, verb
    >>> dog, cat = noun_phrase("the dog", "old"), noun_phrase("a cat")
    >>> statement(Clause(dog, verb("see"), object=cat, tense="past", time=time("yesterday"), front="time")).target
    'Gestern hat der alte Hund eine Katze gesehen.'

Every tree has one rendering in each language, so every English sentence of the corpus has one German translation.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from .lexicon import (
    ADJECTIVE_ENDINGS,
    AUXILIARIES,
    CONTRACTIONS,
    DETERMINERS,
    MODALS,
    PREPOSITIONS,
    RELATIVE,
    Adjective,
    Case,
    Determiner,
    Noun,
    Time,
    Verb,
    adjective,
    noun,
)

Tense = Literal["present", "past", "future", "can", "must", "want", "should", "like"]
Conjunction = Literal["because", "although", "if", "when", "before", "while"]


class Nominal(Protocol):
    """What can fill the place of a subject or an object."""

    @property
    def person(self) -> int:
        """Row of agreement: 0 ich, 1 du, 2 third person singular, 3 any plural."""

    def english(self, subject: bool) -> str: ...

    def german(self, case: Case) -> str: ...

    def rules(self) -> set[str]: ...


@dataclass(frozen=True)
class Pronoun:
    """A personal pronoun; `antecedent` marks one whose German gender comes from a noun earlier in the sentence."""

    subject: str
    object: str
    forms: tuple[str, str, str]
    person: int
    antecedent: bool = False

    def english(self, subject: bool) -> str:
        return self.subject if subject else self.object

    def german(self, case: Case) -> str:
        return self.forms[("nom", "acc", "dat").index(case)]

    def rules(self) -> set[str]:
        return {"antecedent"} if self.antecedent else {"pronoun"}


@dataclass(frozen=True)
class Gap:
    """The place that a relative pronoun or a question word has left; the word itself opens the clause."""

    opener: str
    forms: tuple[str, str, str]
    person: int = 2

    def english(self, subject: bool) -> str:
        return ""

    def german(self, case: Case) -> str:
        return self.forms[("nom", "acc", "dat").index(case)]

    def rules(self) -> set[str]:
        return set()


@dataclass(frozen=True)
class PrepositionalPhrase:
    """A preposition with its noun phrase; two-way prepositions take the accusative for a direction."""

    preposition: str
    noun_phrase: "NounPhrase"
    direction: bool = False

    def english(self) -> str:
        return f"{self.preposition} {self.noun_phrase.english()}"

    def german(self) -> str:
        german, fixed = PREPOSITIONS[self.preposition]
        case: Case = fixed or ("acc" if self.direction else "dat")
        return _with_preposition(german, self.noun_phrase, case)


@dataclass(frozen=True)
class NounPhrase:
    """Determiner, adjectives and noun, with an optional genitive, prepositional phrase or relative clause.

    A `possessor` takes the place of the English determiner ("my brother's dog") and follows the German noun. In
    `relative`, the clause's subject or object must be the `Gap` that `relative_gap` makes for this phrase.
    """

    noun: Noun
    determiner: Determiner
    plural: bool = False
    adjectives: tuple[Adjective, ...] = ()
    possessor: "NounPhrase | None" = None
    attachment: PrepositionalPhrase | None = None
    relative: "Clause | None" = None

    @property
    def person(self) -> int:
        return 3 if self.plural else 2

    @property
    def column(self) -> str:
        return "p" if self.plural else self.noun.gender

    def english(self, subject: bool = False) -> str:
        words = [*(adjective.english for adjective in self.adjectives)]
        words.append(self.noun.plural if self.plural else self.noun.singular)
        if self.possessor:
            owner = self.possessor.english()
            words.insert(0, owner + ("'" if self.possessor.plural and owner.endswith("s") else "'s"))
        else:
            article = self.determiner.plural if self.plural else self.determiner.singular
            words.insert(0, "an" if article == "a" and words[0][0] in "aeiou" else article or "")
        if self.attachment:
            words.append(self.attachment.english())
        if self.relative:
            words.append(self.relative.english())
        return " ".join(filter(None, words))

    def german(self, case: Case) -> str:
        endings = ADJECTIVE_ENDINGS[self.determiner.adjective_pattern]
        words = [self.determiner.decline(case, self.column)]
        words += [adjective.stem + endings[case][self.column] for adjective in self.adjectives]
        words.append(self.noun.decline(case, self.plural))
        if self.possessor:
            words.append(self.possessor.german("gen"))
        if self.attachment:
            words.append(self.attachment.german())
        if self.relative:
            words.append(f", {self.relative.german('final')} ,")
        return " ".join(filter(None, words))

    def rules(self) -> set[str]:
        found = {self.determiner.pattern + "-article"}
        marks = {
            "plural": self.plural,
            "adjective": len(self.adjectives) == 1,
            "two-adjectives": len(self.adjectives) > 1,
            "genitive": self.possessor,
            "noun-attachment": self.attachment,
            "relative-clause": self.relative,
        }
        found |= {name for name, present in marks.items() if present}
        for part in (self.possessor, self.attachment and self.attachment.noun_phrase, self.relative):
            found |= part.rules() if part else set()
        return found


@dataclass(frozen=True)
class Clause:
    """One clause: a verb with what its frame asks for, and adverbials.

    Args:
        subject: a noun phrase, a pronoun, or the gap of a relative clause or a question.
        verb: the verb; None for the copula *to be* with a `predicate`.
        object: accusative, dative or prepositional, as the verb governs it.
        recipient: the dative of a verb such as *give*; `to_recipient` puts it last in English, after *to*.
        phrase: a location, or a direction where its `direction` is set.
        time: a time adverbial.
        tense: `past` is the German perfect; `like` is *likes to* + verb, in German the adverb *gern*.
        negated: German negates an indefinite accusative with kein, all else with nicht.
        front: what opens the main clause in place of the subject.
        wh: "where" or "when", asking for a phrase or a time that the clause lacks.
    """

    subject: Nominal
    verb: Verb | None
    object: Nominal | None = None
    recipient: Nominal | None = None
    to_recipient: bool = False
    phrase: PrepositionalPhrase | None = None
    time: Time | None = None
    predicate: Adjective | None = None
    tense: Tense = "present"
    negated: bool = False
    front: Literal["time", "place"] | None = None
    wh: Literal["where", "when"] | None = None

    def english(self, inverted: bool = False) -> str:
        """The clause in English; `inverted` is the order of a question with do-support."""
        gap = self._gap()
        opener = gap.opener if gap else self.wh or ""
        subject_asked = isinstance(self.subject, Gap)
        finite, rest = self._english_verb(do_support=inverted and not subject_asked)
        subject = self.subject.english(True)
        words = [finite, subject, rest] if inverted else [subject, finite, rest]
        recipient = self.recipient.english(False) if self.recipient else ""
        words += ["" if self.to_recipient else recipient, self.object.english(False) if self.object else ""]
        words += [f"to {recipient}" if self.to_recipient else "", self.predicate.english if self.predicate else ""]
        words += [self.phrase.english() if self.phrase and self.front != "place" else ""]
        words += [self.time.english if self.time and self.front != "time" else ""]
        fronted = {"time": self.time and self.time.english, "place": self.phrase and self.phrase.english()}
        words = [opener, *([f"{fronted[self.front]} ,"] if self.front else []), *words]
        return " ".join(filter(None, words))

    def infinitive_english(self) -> str:
        """The clause without subject and finite verb, for *in order to*."""
        verb = self.verb.english if self.verb else "be"
        return " ".join(filter(None, [verb, self.object.english(False) if self.object else ""]))

    def german(self, order: Literal["second", "first", "final", "zu"] = "second") -> str:
        """The clause in German, its finite verb second, first (questions, after a fronted clause) or last.

        `zu` is the infinitive clause with zu, without a subject.
        """
        finite, tail = self._german_verb(final=order in ("final", "zu"))
        gap = self._gap()
        middle = self._german_middle()
        subject = "" if isinstance(self.subject, Gap) else self.subject.german("nom")
        reflexive = self._reflexive()
        # sich comes right after the finite verb or the conjunction: before a noun subject, after a pronoun.
        subject_first = (order == "second" and not self.front) or not isinstance(self.subject, NounPhrase)
        if reflexive and subject_first:
            middle.insert(0, reflexive)
        elif reflexive:
            subject = f"{reflexive} {subject}"
        if order == "zu":
            assert self.verb is not None
            return " ".join(
                [
                    *middle,
                    f"{self.verb.prefix}zu{self.verb.infinitive}"
                    if self.verb.prefix
                    else f"zu {self.verb.infinitive}",
                ]
            )
        opener = self._german_gap(gap) if gap else {"where": "wo", "when": "wann", None: ""}[self.wh]
        if order == "final":
            words = [opener, subject, *middle, *tail, finite]
        elif opener or order == "first":
            words = [opener, finite, subject, *middle, *tail]
        elif self.front:
            fronted = self.time.german if self.front == "time" and self.time else ""
            words = [fronted or (self.phrase.german() if self.phrase else ""), finite, subject, *middle, *tail]
        else:
            words = [subject, finite, *middle, *tail]
        return " ".join(filter(None, words))

    def rules(self) -> set[str]:
        found = _verb_rules(self.verb) | {f"fronted-{self.front}"} - {"fronted-None"}
        located = self.phrase and not self.phrase.direction
        marks = {
            "perfect": self.tense == "past" and self.verb,
            "future": self.tense == "future",
            "modal": self.tense in MODALS,
            "gern": self.tense == "like",
            "negation": self.negated,
            "location": located,
            "direction": self.phrase and not located,
            "wh-question": self.wh,
        }
        found |= {name for name, present in marks.items() if present}
        for part in (self.subject, self.object, self.recipient, self.phrase and self.phrase.noun_phrase):
            found |= part.rules() if part else set()
        return found

    def _gap(self) -> Gap | None:
        return next((part for part in (self.subject, self.object) if isinstance(part, Gap)), None)

    def _german_gap(self, gap: Gap) -> str:
        if gap is self.subject or self.verb is None:
            return gap.german("nom")
        return _with_preposition(self.verb.preposition, gap, self.verb.case)

    def _english_verb(self, do_support: bool) -> tuple[str, str]:
        """Finite verb, and what follows it or, in a question, the subject."""
        person, negation = self.subject.person, "not " if self.negated else ""
        if self.verb is None:
            if self.tense == "future":
                return "will", f"{negation}be"
            be = ("was", "were", "was", "were") if self.tense == "past" else ("am", "are", "is", "are")
            return be[person], negation.strip()
        base = self.verb.english
        if self.tense in ("future", "can", "must", "should"):
            finite: str = "will" if self.tense == "future" else self.tense
            return ("cannot", base) if self.negated and finite == "can" else (finite, negation + base)
        if self.tense in ("want", "like"):
            base = f"{self.tense} to {base}"
        if do_support or self.negated:
            finite = "did" if self.tense == "past" else "does" if person == 2 else "do"
            return finite, negation + base
        if self.tense == "past":
            return self.verb.past, ""
        if self.tense in ("want", "like"):
            return f"{self.tense}{'s' if person == 2 else ''} to {self.verb.english}", ""
        return self.verb.english_present(person), ""

    def _german_verb(self, final: bool) -> tuple[str, list[str]]:
        """Finite verb, and the non-finite rest that ends the clause."""
        person = self.subject.person
        if self.verb is None:
            if self.tense == "future":
                return AUXILIARIES["future"][person], ["sein"]
            return AUXILIARIES["war" if self.tense == "past" else "sein"][person], []
        if self.tense == "past":
            return AUXILIARIES[self.verb.auxiliary][person], [self.verb.participle]
        if self.tense in ("future", *MODALS):
            return AUXILIARIES[self.tense][person], [self.verb.prefix + self.verb.infinitive]
        finite = self.verb.german_present(person)
        return (self.verb.prefix + finite, []) if final else (finite, [self.verb.prefix])

    def _reflexive(self) -> str:
        if not (self.verb and self.verb.reflexive):
            return ""
        return {"I": "mich", "you": "dich", "we": "uns"}.get(self.subject.english(True), "sich")

    def _german_middle(self) -> list[str]:
        """The middle field: pronouns, time, gern, dative, accusative, nicht, then prepositional and predicate."""
        case: Case = self.verb.case if self.verb else "acc"
        preposition = self.verb.preposition if self.verb else ""
        words: list[str] = []
        target = None if isinstance(self.object, Gap) else self.object
        pronouns = [] if preposition else [(target, case)]
        pronouns.append((self.recipient, "dat"))
        words += [part.german(form) for part, form in pronouns if isinstance(part, Pronoun)]
        words += [self.time.german] if self.time and self.front != "time" else []
        words += ["gern"] if self.tense == "like" else []
        words += [self.recipient.german("dat")] if isinstance(self.recipient, NounPhrase) else []
        negated_object = self.negated and case == "acc" and not preposition and _takes_kein(target)
        if isinstance(target, NounPhrase) and not preposition:
            words.append((replace(target, determiner=DETERMINERS["no"]) if negated_object else target).german(case))
        words += ["nicht"] if self.negated and not negated_object else []
        words += [_with_preposition(preposition, target, case)] if target and preposition else []
        words += [self.phrase.german()] if self.phrase and self.front != "place" else []
        words += [self.predicate.german] if self.predicate else []
        return words


def _takes_kein(part: Nominal | None) -> bool:
    if not isinstance(part, NounPhrase) or part.possessor:
        return False
    return part.determiner.pattern == "bare" or part.determiner.german == "ein"


def _with_preposition(preposition: str, part: Nominal, case: Case) -> str:
    """The preposition with what it governs; it contracts with a definite article, never with a pronoun."""
    article, _, rest = part.german(case).partition(" ")
    contracted = CONTRACTIONS.get((preposition, article)) if isinstance(part, NounPhrase) else None
    return " ".join(filter(None, [contracted, rest] if contracted else [preposition, article, rest]))


def _verb_rules(entry: Verb | None) -> set[str]:
    if entry is None:
        return {"copula"}
    frames = {"dat": "dative-verb", "give": "ditransitive", "prep": "prepositional-verb", "put": "placement"}
    marks = {
        frames.get(entry.frame, ""): entry.frame in frames,
        "separable": entry.prefix,
        "reflexive": entry.reflexive,
        "word-by-context": entry.english in ("know", "eat", "put"),
    }
    return {name for name, present in marks.items() if present}


PRONOUNS = {
    "I": Pronoun("I", "me", ("ich", "mich", "mir"), 0),
    "you": Pronoun("you", "you", ("du", "dich", "dir"), 1),
    "he": Pronoun("he", "him", ("er", "ihn", "ihm"), 2),
    "she": Pronoun("she", "her", ("sie", "sie", "ihr"), 2),
    "we": Pronoun("we", "us", ("wir", "uns", "uns"), 3),
    "they": Pronoun("they", "them", ("sie", "sie", "ihnen"), 3),
}
WHO = Gap("who", ("wer", "wen", "wem"))
WHOM = Gap("whom", ("wer", "wen", "wem"))
WHAT = Gap("what", ("was", "was", ""))


def noun_phrase(
    words: str, *adjectives: str, possessor: NounPhrase | None = None, attachment: PrepositionalPhrase | None = None
) -> NounPhrase:
    """Build a noun phrase from English words: determiner and noun ("these dogs", "a cat", "milk"), and adjectives.

    Raises:
        ValueError: a word is not in the lexicon, or the determiner does not go with the number of the noun.
    """
    article, _, form = words.rpartition(" ")
    article = "a" if article == "an" else article
    entry, plural = noun(form)
    matching = [d for d in DETERMINERS.values() if article == (d.plural if plural else d.singular)]
    if not matching:
        raise ValueError(f"no determiner {article!r} for {form!r}; see DETERMINERS in sparseq.data.lexicon")
    described = tuple(adjective(word) for word in adjectives)
    return NounPhrase(entry, matching[0], plural, described, possessor, attachment)


def relative_gap(head: NounPhrase, subject: bool) -> Gap:
    """The gap for a relative clause of `head`, whose relative pronoun agrees with it in gender and number."""
    nominative, accusative, dative = (RELATIVE[case][head.column] for case in ("nom", "acc", "dat"))
    opener = "who" if subject and head.noun.kind == "p" else "that"
    return Gap(opener, (nominative, accusative, dative), head.person)


def pronoun_for(antecedent: NounPhrase) -> Pronoun:
    """*it* (er, sie or es, as the gender of the noun asks) or *they*, for a phrase earlier in the sentence."""
    if antecedent.plural:
        return replace(PRONOUNS["they"], antecedent=True)
    forms = {"m": ("er", "ihn", "ihm"), "f": ("sie", "sie", "ihr"), "n": ("es", "es", "ihm")}[antecedent.noun.gender]
    return Pronoun("it", "it", forms, 2, antecedent=True)


@dataclass(frozen=True)
class Pair:
    """A sentence in English and in German, with the names of the grammar rules it uses."""

    source: str
    target: str
    rules: frozenset[str]


def _written(words: str, stop: str) -> str:
    """Attach commas, drop those that meet or end the sentence, capitalise, and add the final mark."""
    text = re.sub(r"[ ,]*$", "", re.sub(r"( ,)+", ",", words.strip(" ,")))
    return text[0].upper() + text[1:] + stop


def _pair(english: str, german: str, rules: Iterable[str], stop: str = ".") -> Pair:
    return Pair(_written(english, stop), _written(german, stop), frozenset(rules))


def statement(clause: Clause) -> Pair:
    """A main clause."""
    return _pair(clause.english(), clause.german(), clause.rules())


def question(clause: Clause) -> Pair:
    """A yes-no question, or, with a gap such as `WHO` or with `wh`, a question with a question word."""
    asks_word = bool(clause.wh or clause._gap())
    inverted = not isinstance(clause.subject, Gap)
    rules = clause.rules() | {"question", "wh-question" if asks_word else "yes-no-question"}
    return _pair(clause.english(inverted=inverted), clause.german("first"), rules, "?")


def subordinate(main: Clause, conjunction: Conjunction, clause: Clause, *, fronted: bool = False) -> Pair:
    """A main clause with an adverbial clause after it, or before it, which inverts the German main clause.

    *When* is wenn, but als where its clause is in the past.
    """
    german_conjunctions = {
        "because": "weil",
        "although": "obwohl",
        "if": "wenn",
        "before": "bevor",
        "while": "während",
    }
    when = "als" if clause.tense == "past" else "wenn"
    german = f"{german_conjunctions.get(conjunction, when)} {clause.german('final')}"
    rules = main.rules() | clause.rules() | {conjunction}
    if fronted:
        english = f"{conjunction} {clause.english()} , {main.english()}"
        return _pair(english, f"{german} , {main.german('first')}", rules | {"fronted-clause"})
    return _pair(f"{main.english()} {conjunction} {clause.english()}", f"{main.german()} , {german}", rules)


def that_clause(main: Clause, clause: Clause) -> Pair:
    """A clause that is the object of know, believe, say or hope."""
    german = f"{main.german()} , dass {clause.german('final')}"
    return _pair(f"{main.english()} that {clause.english()}", german, main.rules() | clause.rules() | {"that-clause"})


def coordinate(left: Clause, conjunction: Literal["and", "but"], right: Clause) -> Pair:
    """Two main clauses joined by und or aber."""
    english = f"{left.english()} , {conjunction} {right.english()}"
    german = f"{left.german()} {'und' if conjunction == 'and' else ', aber'} {right.german()}"
    return _pair(english, german, left.rules() | right.rules() | {"coordination"})


def purpose(main: Clause, aim: Clause) -> Pair:
    """*in order to*: um with a zu infinitive, which keeps the verb and the object of `aim` only."""
    aim = Clause(main.subject, aim.verb, aim.object)
    english = f"{main.english()} in order to {aim.infinitive_english()}"
    german = f"{main.german()} , um {aim.german('zu')}"
    return _pair(english, german, main.rules() | aim.rules() | {"purpose"})
