import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import sacrebleu

from sparseq.data.grammar import (
    HELD_OUT_PAIRS,
    HELD_OUT_SHARE,
    MAX_CORPUS_SIZE,
    MAX_WORDS,
    MIN_WORDS,
    GrammarCorpus,
    Pair,
    _dictionary,
    generate_corpus,
    is_held_out,
    word_for_word,
    write_corpus,
)
from sparseq.data.lexicon import ADJECTIVES, NOUNS, VERBS, adjective, noun, time, verb
from sparseq.data.syntax import (
    PRONOUNS,
    WHAT,
    WHO,
    WHOM,
    Clause,
    NounPhrase,
    coordinate,
    noun_phrase,
    pronoun_for,
    purpose,
    question,
    relative_gap,
    statement,
    subordinate,
    that_clause,
)
from sparseq.data.syntax import PrepositionalPhrase as PP

ME, YOU, HE, SHE, WE, THEY = (PRONOUNS[word] for word in ("I", "you", "he", "she", "we", "they"))
NP = noun_phrase
DOG, CAT, MAN, WOMAN, TEACHER = NP("the dog"), NP("the cat"), NP("the man"), NP("the woman"), NP("the teacher")


def copula(subject: NounPhrase, word: str, **options: object) -> Clause:
    return replace(Clause(subject, None, predicate=adjective(word)), **options)  # type: ignore[arg-type]


def with_subject_relative(head: NounPhrase, clause: Clause) -> NounPhrase:
    return replace(head, relative=replace(clause, subject=relative_gap(head, subject=True)))


def with_object_relative(head: NounPhrase, clause: Clause) -> NounPhrase:
    return replace(head, relative=replace(clause, object=relative_gap(head, subject=False)))


# Each translation was written by hand, rule by rule, before it was compared.
SENTENCES: list[tuple[Pair, str, str]] = [
    # Roles by position.
    (statement(Clause(DOG, verb("see"), CAT)), "The dog sees the cat.", "Der Hund sieht die Katze."),
    (statement(Clause(CAT, verb("see"), DOG)), "The cat sees the dog.", "Die Katze sieht den Hund."),
    # Articles and adjective endings: weak, mixed, strong; weak masculines; dative plural.
    (
        statement(Clause(NP("a boy", "small"), verb("help"), NP("the neighbour", "old"))),
        "A small boy helps the old neighbour.",
        "Ein kleiner Junge hilft dem alten Nachbarn.",
    ),
    (
        statement(Clause(NP("this girl", "clever"), verb("read"), NP("a book", "big", "green"))),
        "This clever girl reads a big green book.",
        "Dieses kluge Mädchen liest ein großes grünes Buch.",
    ),
    (
        statement(Clause(NP("two sisters", "tired"), verb("thank"), NP("our friends", "old"))),
        "Two tired sisters thank our old friends.",
        "Zwei müde Schwestern danken unseren alten Freunden.",
    ),
    (
        statement(Clause(NP("many students", "poor"), verb("drink"), NP("coffee", "cold"))),
        "Many poor students drink cold coffee.",
        "Viele arme Studenten trinken kalten Kaffee.",
    ),
    (
        statement(Clause(NP("every queen"), verb("buy"), NP("dresses", "expensive"))),
        "Every queen buys expensive dresses.",
        "Jede Königin kauft teure Kleider.",
    ),
    # Genitive, prepositional attribute.
    (
        statement(Clause(NP("the dog", "black", possessor=NP("my brother")), verb("sleep"))),
        "My brother's black dog sleeps.",
        "Der schwarze Hund meines Bruders schläft.",
    ),
    (
        statement(Clause(NP("the man", attachment=PP("with", NP("the hat", "red"))), verb("laugh"))),
        "The man with the red hat laughs.",
        "Der Mann mit dem roten Hut lacht.",
    ),
    # Verb second after a fronted adverbial; perfect with haben and sein.
    (
        statement(Clause(DOG, verb("see"), NP("a cat"), tense="past", time=time("yesterday"), front="time")),
        "Yesterday, the dog saw a cat.",
        "Gestern hat der Hund eine Katze gesehen.",
    ),
    (
        statement(Clause(ME, verb("swim"), tense="past", phrase=PP("in", NP("the forest", "quiet")), front="place")),
        "In the quiet forest, I swam.",
        "Im ruhigen Wald bin ich geschwommen.",
    ),
    (
        statement(Clause(SHE, verb("arrive"), tense="past", time=time("last week"))),
        "She arrived last week.",
        "Sie ist letzte Woche angekommen.",
    ),
    # Separable verbs, modal, future, gern.
    (
        statement(Clause(YOU, verb("invite"), NP("her uncle"), time=time("today"))),
        "You invite her uncle today.",
        "Du lädst heute ihren Onkel ein.",
    ),
    (
        statement(Clause(WE, verb("pick up"), NP("the guests"), tense="must", time=time("tomorrow"))),
        "We must pick up the guests tomorrow.",
        "Wir müssen morgen die Gäste abholen.",
    ),
    (
        statement(Clause(THEY, verb("call"), SHE, tense="future", time=time("soon"), front="time")),
        "Soon, they will call her.",
        "Bald werden sie sie anrufen.",
    ),
    (statement(Clause(HE, verb("swim"), tense="like")), "He likes to swim.", "Er schwimmt gern."),
    # Two-way prepositions and put.
    (
        statement(
            Clause(WOMAN, verb("put", "legen"), NP("the letter"), phrase=PP("on", NP("the table"), direction=True))
        ),
        "The woman puts the letter on the table.",
        "Die Frau legt den Brief auf den Tisch.",
    ),
    (
        statement(
            Clause(SHE, verb("put", "stellen"), NP("the cup"), phrase=PP("next to", NP("a clock"), direction=True))
        ),
        "She puts the cup next to a clock.",
        "Sie stellt die Tasse neben eine Uhr.",
    ),
    (
        statement(Clause(NP("the letter"), verb("lie"), phrase=PP("on", NP("the table")))),
        "The letter lies on the table.",
        "Der Brief liegt auf dem Tisch.",
    ),
    (
        statement(Clause(NP("the children"), verb("run"), phrase=PP("into", NP("the castle"), direction=True))),
        "The children run into the castle.",
        "Die Kinder laufen ins Schloss.",
    ),
    (
        statement(Clause(ME, verb("go"), tense="want", phrase=PP("to", NP("the school"), direction=True))),
        "I want to go to the school.",
        "Ich will zur Schule gehen.",
    ),
    # Ditransitive in both English orders, pronoun before noun.
    (
        statement(Clause(TEACHER, verb("give"), NP("an apple"), recipient=NP("the child"))),
        "The teacher gives the child an apple.",
        "Der Lehrer gibt dem Kind einen Apfel.",
    ),
    (
        statement(Clause(TEACHER, verb("show"), NP("these pictures"), recipient=NP("a woman"), to_recipient=True)),
        "The teacher shows these pictures to a woman.",
        "Der Lehrer zeigt einer Frau diese Bilder.",
    ),
    (
        statement(
            Clause(HE, verb("lend"), NP("his coat"), recipient=ME, to_recipient=True, tense="past", time=time("today"))
        ),
        "He lent his coat to me today.",
        "Er hat mir heute seinen Mantel geliehen.",
    ),
    # Negation.
    (
        statement(Clause(MAN, verb("buy"), NP("a hat", "new"), negated=True)),
        "The man does not buy a new hat.",
        "Der Mann kauft keinen neuen Hut.",
    ),
    (
        statement(Clause(MAN, verb("see"), DOG, phrase=PP("in", NP("the garden")), tense="past", negated=True)),
        "The man did not see the dog in the garden.",
        "Der Mann hat den Hund nicht im Garten gesehen.",
    ),
    (
        statement(Clause(ME, verb("drink"), NP("milk"), negated=True)),
        "I do not drink milk.",
        "Ich trinke keine Milch.",
    ),
    # Prepositional and reflexive verbs.
    (
        statement(Clause(NP("the boys"), verb("wait for"), NP("their father"))),
        "The boys wait for their father.",
        "Die Jungen warten auf ihren Vater.",
    ),
    (
        statement(Clause(WE, verb("remember"), NP("the city", "old"), tense="past")),
        "We remembered the old city.",
        "Wir haben uns an die alte Stadt erinnert.",
    ),
    (
        statement(Clause(NP("the singer"), verb("rest"), time=time("at night"), front="time")),
        "At night, the singer rests.",
        "In der Nacht ruht sich die Sängerin aus.",
    ),
    # Relative clauses: subject, accusative, dative, prepositional.
    (
        statement(copula(with_subject_relative(NP("the boy"), Clause(ME, verb("wake up"), tense="past")), "tired")),
        "The boy who woke up is tired.",
        "Der Junge, der aufgewacht ist, ist müde.",
    ),
    (
        statement(Clause(ME, verb("eat"), with_object_relative(NP("a cake"), Clause(NP("my aunt"), verb("cook"))))),
        "I eat a cake that my aunt cooks.",
        "Ich esse einen Kuchen, den meine Tante kocht.",
    ),
    (
        statement(Clause(with_object_relative(NP("the girls"), Clause(HE, verb("help"))), verb("sing"))),
        "The girls that he helps sing.",
        "Die Mädchen, denen er hilft, singen.",
    ),
    (
        statement(copula(with_object_relative(NP("the horse"), Clause(YOU, verb("dream of"))), "white")),
        "The horse that you dream of is white.",
        "Das Pferd, von dem du träumst, ist weiß.",
    ),
    # Subordinate clauses: verb last; inversion after a fronted clause; als and wenn.
    (
        subordinate(Clause(CAT, verb("hide"), NP("the ring")), "because", Clause(DOG, verb("get up"))),
        "The cat hides the ring because the dog gets up.",
        "Die Katze versteckt den Ring, weil der Hund aufsteht.",
    ),
    (
        subordinate(copula(SHE, "happy", tense="past"), "when", Clause(WE, verb("come"), tense="past"), fronted=True),  # type: ignore[arg-type]
        "When we came, she was happy.",
        "Als wir gekommen sind, war sie glücklich.",
    ),
    (
        subordinate(Clause(HE, verb("sing")), "when", Clause(HE, verb("cook"), NP("soups")), fronted=True),
        "When he cooks soups, he sings.",
        "Wenn er Suppen kocht, singt er.",
    ),
    (
        subordinate(Clause(ME, verb("work")), "although", Clause(ME, verb("rest"), tense="should")),
        "I work although I should rest.",
        "Ich arbeite, obwohl ich mich ausruhen soll.",
    ),
    # Words by context: know, eat.
    (
        that_clause(Clause(ME, verb("know", "wissen")), Clause(SHE, verb("know", "kennen"), NP("the king"))),
        "I know that she knows the king.",
        "Ich weiß, dass sie den König kennt.",
    ),
    (
        coordinate(
            Clause(NP("the bear"), verb("eat", "fressen"), NP("an egg")),
            "but",
            Clause(MAN, verb("eat", "essen"), NP("a pear")),
        ),
        "The bear eats an egg, but the man eats a pear.",
        "Der Bär frisst ein Ei, aber der Mann isst eine Birne.",
    ),
    # Pronouns with an antecedent, in the gender of the German noun.
    (
        subordinate(
            Clause(WOMAN, verb("buy"), NP("the table"), tense="past"),
            "because",
            copula(pronoun_for(NP("the table")), "cheap", tense="past"),  # type: ignore[arg-type]
        ),
        "The woman bought the table because it was cheap.",
        "Die Frau hat den Tisch gekauft, weil er billig war.",
    ),
    (
        subordinate(
            Clause(ME, verb("repair"), pronoun_for(NP("the lamp"))),
            "if",
            copula(NP("the lamp"), "broken"),
            fronted=True,
        ),
        "If the lamp is broken, I repair it.",
        "Wenn die Lampe kaputt ist, repariere ich sie.",
    ),
    (
        coordinate(
            Clause(ME, verb("lose"), NP("my key"), tense="past"),
            "and",
            Clause(HE, verb("find"), pronoun_for(NP("my key")), tense="past"),
        ),
        "I lost my key, and he found it.",
        "Ich habe meinen Schlüssel verloren und er hat ihn gefunden.",
    ),
    # Purpose, questions.
    (
        purpose(
            Clause(SHE, verb("go"), phrase=PP("into", NP("the city"), direction=True)),
            Clause(SHE, verb("pick up"), NP("a friend")),
        ),
        "She goes into the city in order to pick up a friend.",
        "Sie geht in die Stadt, um einen Freund abzuholen.",
    ),
    (
        question(Clause(YOU, verb("close"), NP("the window"), tense="past")),
        "Did you close the window?",
        "Hast du das Fenster zugemacht?",
    ),
    (question(Clause(WHO, verb("open"), NP("the door"))), "Who opens the door?", "Wer macht die Tür auf?"),
    (question(Clause(MAN, verb("trust"), WHOM)), "Whom does the man trust?", "Wem vertraut der Mann?"),
    (question(Clause(MAN, verb("wait for"), WHOM)), "Whom does the man wait for?", "Auf wen wartet der Mann?"),
    (question(Clause(YOU, verb("read"), WHAT, tense="want")), "What do you want to read?", "Was willst du lesen?"),
    (
        question(Clause(NP("the frogs"), verb("sleep"), wh="where", time=time("at night"))),
        "Where do the frogs sleep at night?",
        "Wo schlafen die Frösche in der Nacht?",
    ),
]


@pytest.fixture(scope="module")
def corpus() -> GrammarCorpus:
    return generate_corpus(train_size=4_000, validation_size=200, test_size=600, seed=3)


@pytest.mark.parametrize(("pair", "source", "target"), SENTENCES, ids=[source for _, source, _ in SENTENCES])
def test_grammar_agrees_with_translations_written_by_hand(pair: Pair, source: str, target: str) -> None:
    assert (pair.source, pair.target) == (source, target)


def test_rules_name_what_a_sentence_uses() -> None:
    clause = Clause(
        NP("the man", possessor=NP("the king")), verb("invite"), DOG, tense="past", time=time("today"), front="time"
    )
    expected = {"definite-article", "genitive", "separable", "perfect", "fronted-time"}
    assert statement(clause).rules == expected


def test_lexicon_is_rich_and_unambiguous() -> None:
    forms = [form for entry in NOUNS for form in (entry.singular, entry.plural) if form != "-"]
    assert len(forms) == len(set(forms))
    assert len({entry.english for entry in ADJECTIVES}) == len(ADJECTIVES) >= 30
    assert 60 <= len(NOUNS) <= 120
    assert len({entry.prefix + entry.infinitive for entry in VERBS}) >= 50


@pytest.mark.parametrize(
    ("build", "word"),
    [
        (lambda: noun("table-cloth"), "table-cloth"),
        (lambda: verb("know", "können"), "können"),
        (lambda: adjective("quick"), "quick"),
        (lambda: time("in May"), "in May"),
        (lambda: noun_phrase("two dog"), "two"),
    ],
)
def test_unknown_words_are_named(build: object, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        build()  # type: ignore[operator]


def test_splits_have_the_sizes_asked_for_and_share_no_sentence(corpus: GrammarCorpus) -> None:
    splits = [corpus.train, corpus.validation, corpus.test]
    assert [len(split) for split in splits] == [4_000, 200, 600]
    pairs = [pair for split in splits for pair in split]
    assert len({pair.source for pair in pairs}) == len({pair.target for pair in pairs}) == len(pairs)
    assert all(MIN_WORDS <= len(pair.source.split()) <= MAX_WORDS for pair in pairs)


def test_held_out_pairs_of_rules_meet_in_the_test_set_only(corpus: GrammarCorpus) -> None:
    held_out = [pair for pair in corpus.test if is_held_out(pair)]
    assert len(held_out) == round(600 * HELD_OUT_SHARE)
    for first, second in HELD_OUT_PAIRS:
        assert any({first, second} <= pair.rules for pair in held_out)
        for split in (corpus.train, corpus.validation):
            assert not any({first, second} <= pair.rules for pair in split)
        for rule in (first, second):
            assert sum(rule in pair.rules for pair in corpus.train) >= 50


def test_every_rule_of_the_test_set_is_seen_in_training(corpus: GrammarCorpus) -> None:
    trained = frozenset().union(*(pair.rules for pair in corpus.train))
    assert all(pair.rules <= trained for pair in corpus.test)
    assert len(trained) >= 35


def test_sentences_are_well_formed(corpus: GrammarCorpus) -> None:
    for pair in [*corpus.train, *corpus.test]:
        for text in (pair.source, pair.target):
            assert text[0].isupper()
            assert text[-1] == ("?" if "question" in pair.rules else ".")
            assert "  " not in text
            assert " ," not in text
            assert ",," not in text


def test_dictionary_alone_scores_under_40_bleu(corpus: GrammarCorpus) -> None:
    references = [pair.target for pair in corpus.test]
    hypotheses = [word_for_word(pair.source) for pair in corpus.test]
    assert sacrebleu.corpus_bleu(hypotheses, [references]).score < 40
    words = {word for pair in corpus.train for word in re.findall("[a-z]+", pair.source.lower().replace("'s ", " "))}
    assert words - _dictionary().keys() == set()
    assert word_for_word("The dog sees the cat.") == "Der Hund sieht der Katze."


def test_corpus_depends_on_the_seed() -> None:
    sizes = {"train_size": 50, "validation_size": 5, "test_size": 10}
    assert generate_corpus(**sizes, seed=1) == generate_corpus(**sizes, seed=1)
    assert generate_corpus(**sizes, seed=1) != generate_corpus(**sizes, seed=2)


def test_corpus_does_not_depend_on_the_hash_seed(tmp_path: Path) -> None:
    code = (
        "import sys; from sparseq.data.grammar import generate_corpus, write_corpus;"
        "write_corpus(generate_corpus(train_size=300, validation_size=20, test_size=30, seed=5), sys.argv[1])"
    )
    root = Path(__file__).parents[2]
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(root)}
        subprocess.run([sys.executable, "-c", code, str(tmp_path / hash_seed)], env=environment, check=True)
    first, second = ({f.name: f.read_bytes() for f in (tmp_path / seed).iterdir()} for seed in ("1", "2"))
    assert first == second
    assert len(first) == 6


def test_written_files_are_aligned(tmp_path: Path) -> None:
    corpus = generate_corpus(train_size=40, validation_size=6, test_size=9, seed=0)
    write_corpus(corpus, tmp_path / "new" / "folder")
    for name, pairs in (("train", corpus.train), ("val", corpus.validation), ("test", corpus.test)):
        texts = [(tmp_path / "new" / "folder" / f"{name}.{language}").read_bytes() for language in ("en", "de")]
        assert not any(b"\r" in text for text in texts)
        sources, targets = (text.decode("utf-8").removesuffix("\n").split("\n") for text in texts)
        assert list(zip(sources, targets, strict=True)) == [(pair.source, pair.target) for pair in pairs]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"train_size": 0}, r"`train_size` must be at least 1, but is 0"),
        ({"validation_size": -3}, r"`validation_size` must be at least 1, but is -3"),
        ({"test_size": 0}, r"`test_size` must be at least 1, but is 0"),
        ({"train_size": MAX_CORPUS_SIZE}, rf"501500, above the limit of {MAX_CORPUS_SIZE}.*smaller `train_size`"),
    ],
)
def test_impossible_sizes_are_refused(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate_corpus(**sizes)
