"""The words of the synthetic English-German corpus and their German inflection (see `sparseq.data.grammar`)."""

import re
from dataclasses import dataclass
from functools import cache
from typing import Literal

Case = Literal["nom", "acc", "dat", "gen"]

# English singular and plural, German singular and plural, gender, tags. The first tag is the kind: p person, a animal,
# t thing, f food, d drink (no plural), o place. Others: i one can be inside, u one can be on, s placed standing,
# l placed lying, r readable, c clothing, m machine, b opened and closed, w weak masculine (only the nominative
# singular differs from the plural).
_NOUNS_TEXT = """
man men Mann Männer m p; woman women Frau Frauen f p; child children Kind Kinder n p; girl girls Mädchen Mädchen n p
boy boys Junge Jungen m pw; teacher teachers Lehrer Lehrer m p; doctor doctors Arzt Ärzte m p
aunt aunts Tante Tanten f p; uncle uncles Onkel Onkel m p; mother mothers Mutter Mütter f p
father fathers Vater Väter m p; sister sisters Schwester Schwestern f p; brother brothers Bruder Brüder m p
king kings König Könige m p; queen queens Königin Königinnen f p; neighbour neighbours Nachbar Nachbarn m pw
student students Student Studenten m pw; singer singers Sängerin Sängerinnen f p; baker bakers Bäcker Bäcker m p
friend friends Freund Freunde m p; guest guests Gast Gäste m p; baby babies Baby Babys n p
dog dogs Hund Hunde m a; cat cats Katze Katzen f a; horse horses Pferd Pferde n a; cow cows Kuh Kühe f a
bird birds Vogel Vögel m a; pig pigs Schwein Schweine n a; mouse mice Maus Mäuse f a; bear bears Bär Bären m aw
rabbit rabbits Hase Hasen m aw; duck ducks Ente Enten f a; lion lions Löwe Löwen m aw; fox foxes Fuchs Füchse m a
frog frogs Frosch Frösche m a
table tables Tisch Tische m tu; chair chairs Stuhl Stühle m tsu; bed beds Bett Betten n tu
carpet carpets Teppich Teppiche m tlu; box boxes Kiste Kisten f tsub; lamp lamps Lampe Lampen f tsm
clock clocks Uhr Uhren f tsm; computer computers Computer Computer m tsm; bicycle bicycles Fahrrad Fahrräder n t
car cars Auto Autos n tb; bottle bottles Flasche Flaschen f tsb; glass glasses Glas Gläser n ts
cup cups Tasse Tassen f ts; vase vases Vase Vasen f ts; key keys Schlüssel Schlüssel m tl
knife knives Messer Messer n tl; ring rings Ring Ringe m tl; picture pictures Bild Bilder n tl
ball balls Ball Bälle m t; bag bags Tasche Taschen f tsb; window windows Fenster Fenster n tb
door doors Tür Türen f tb; book books Buch Bücher n tlrb; letter letters Brief Briefe m tlrb
newspaper newspapers Zeitung Zeitungen f tlr; story stories Geschichte Geschichten f tr; hat hats Hut Hüte m tlc
coat coats Mantel Mäntel m tlc; shirt shirts Hemd Hemden n tlc; dress dresses Kleid Kleider n tlc
apple apples Apfel Äpfel m f; cake cakes Kuchen Kuchen m f; egg eggs Ei Eier n f; soup soups Suppe Suppen f f
pear pears Birne Birnen f f; potato potatoes Kartoffel Kartoffeln f f; sausage sausages Wurst Würste f f
roll rolls Brötchen Brötchen n f
milk - Milch - f d; water - Wasser - n d; coffee - Kaffee - m d; juice - Saft - m d
garden gardens Garten Gärten m oi; house houses Haus Häuser n oi; kitchen kitchens Küche Küchen f oi
school schools Schule Schulen f oi; park parks Park Parks m oi; forest forests Wald Wälder m oi
city cities Stadt Städte f oi; church churches Kirche Kirchen f oi; library libraries Bibliothek Bibliotheken f oi
shop shops Laden Läden m oi; castle castles Schloss Schlösser n oi; room rooms Zimmer Zimmer n oi
bridge bridges Brücke Brücken f ou; street streets Straße Straßen f ou; roof roofs Dach Dächer n ou
hill hills Hügel Hügel m ou
"""

# English, German predicate form (and attributive stem where it differs), kinds of nouns described.
_ADJECTIVES_TEXT = """
old alt pato; young jung pa; new neu to; big groß pafto; small klein pafto; beautiful schön pato; ugly hässlich pato
strong stark pa; weak schwach pa; tired müde/müd pa; hungry hungrig pa; happy glücklich pa; sad traurig pa
angry wütend pa; friendly freundlich pa; clever klug pa; brave mutig pa; rich reich p; poor arm p
wonderful wunderbar pfdto; quiet ruhig pao; red rot tf; blue blau t; green grün tf; black schwarz at; white weiß at
brown braun at; heavy schwer t; cheap billig fdt; expensive teuer/teur fdt; clean sauber t; dirty schmutzig at
broken kaputt t; empty leer o; fresh frisch fd; sweet süß fd; cold kalt fd; warm warm fd
"""

# English base and past, German infinitive (separable prefix before |), irregular du and er forms or -, participle,
# auxiliary, frame, subject kinds > object kinds. Frames: none, acc, dat, give (dat + acc), prep:X:case, place (needs a
# location), go (needs a direction), put (acc + direction), that (needs a clause); refl- marks a reflexive verb.
_VERBS_TEXT = """
see saw sehen siehst/sieht gesehen haben acc pa>pato
hear heard hören - gehört haben acc pa>pa
love loved lieben - geliebt haben acc pa>pa
look_for looked_for suchen - gesucht haben acc pa>pat
find found finden - gefunden haben acc pa>pat
forget forgot vergessen vergisst/vergisst vergessen haben acc p>pat
know knew kennen - gekannt haben acc p>pa
visit visited besuchen - besucht haben acc p>p
wash washed waschen wäschst/wäscht gewaschen haben acc p>pac
carry carried tragen trägst/trägt getragen haben acc p>pat
draw drew zeichnen - gezeichnet haben acc p>pato
catch caught fangen fängst/fängt gefangen haben acc pa>a
chase chased jagen - gejagt haben acc pa>pa
bite bit beißen - gebissen haben acc a>pa
feed fed füttern - gefüttert haben acc p>a
meet met treffen triffst/trifft getroffen haben acc p>p
buy bought kaufen - gekauft haben acc p>tfa
read read lesen liest/liest gelesen haben acc p>r
write wrote schreiben - geschrieben haben acc p>r
repair repaired reparieren - repariert haben acc p>m
need needed brauchen - gebraucht haben acc p>tfp
lose lost verlieren - verloren haben acc p>l
hide hid verstecken - versteckt haben acc pa>tf
wear wore tragen trägst/trägt getragen haben acc p>c
eat ate essen isst/isst gegessen haben acc p>f
eat ate fressen frisst/frisst gefressen haben acc a>f
cook cooked kochen - gekocht haben acc p>f
drink drank trinken - getrunken haben acc p>d
call called an|rufen - angerufen haben acc p>p
invite invited ein|laden lädst/lädt eingeladen haben acc p>p
pick_up picked_up ab|holen - abgeholt haben acc p>p
look_at looked_at an|schauen - angeschaut haben acc pa>pato
turn_on turned_on ein|schalten - eingeschaltet haben acc p>m
turn_off turned_off aus|schalten - ausgeschaltet haben acc p>m
open opened auf|machen - aufgemacht haben acc p>b
close closed zu|machen - zugemacht haben acc p>b
put_on put_on an|ziehen - angezogen haben acc p>c
help helped helfen hilfst/hilft geholfen haben dat p>pa
thank thanked danken - gedankt haben dat p>p
follow followed folgen - gefolgt sein dat pa>pa
answer answered antworten - geantwortet haben dat p>p
trust trusted vertrauen - vertraut haben dat pa>pa
listen_to listened_to zu|hören - zugehört haben dat pa>p
give gave geben gibst/gibt gegeben haben give p>slcfd
show showed zeigen - gezeigt haben give p>tao
bring brought bringen - gebracht haben give p>slcfda
send sent schicken - geschickt haben give p>slrcf
lend lent leihen - geliehen haben give p>slc
sell sold verkaufen - verkauft haben give p>slcfa
sleep slept schlafen schläfst/schläft geschlafen haben none pa>
laugh laughed lachen - gelacht haben none p>
cry cried weinen - geweint haben none p>
sing sang singen - gesungen haben none p>
work worked arbeiten - gearbeitet haben none p>
play played spielen - gespielt haben none pa>
swim swam schwimmen - geschwommen sein none pa>
wake_up woke_up auf|wachen - aufgewacht sein none pa>
get_up got_up auf|stehen - aufgestanden sein none pa>
arrive arrived an|kommen - angekommen sein none pa>
rest rested aus|ruhen - ausgeruht haben refl-none pa>
hurry hurried beeilen - beeilt haben refl-none pa>
wait_for waited_for warten - gewartet haben prep:auf:acc pa>pa
think_of thought_of denken - gedacht haben prep:an:acc p>pato
dream_of dreamt_of träumen - geträumt haben prep:von:dat pa>pato
talk_about talked_about sprechen sprichst/spricht gesprochen haben prep:über:acc p>pato
play_with played_with spielen - gespielt haben prep:mit:dat pa>pa
remember remembered erinnern - erinnert haben refl-prep:an:acc p>pato
complain_about complained_about beschweren - beschwert haben refl-prep:über:acc p>pato
sit sat sitzen - gesessen haben place pa>u
lie lay liegen - gelegen haben place al>u
stand stood stehen - gestanden haben place pas>u
go went gehen - gegangen sein go pa>
run ran laufen läufst/läuft gelaufen sein go pa>
come came kommen - gekommen sein go pa>
put put stellen - gestellt haben put p>s
put put legen - gelegt haben put p>l
know knew wissen weißt/weiß gewusst haben that p>
believe believed glauben - geglaubt haben that p>
say said sagen - gesagt haben that p>
hope hoped hoffen - gehofft haben that p>
"""

# English, German, tenses it fits: p past, n present, f future and modals.
_TIMES_TEXT = """
yesterday=gestern=p; last week=letzte Woche=p; last year=letztes Jahr=p; this morning=heute Morgen=p
today=heute=pnf; now=jetzt=n; every day=jeden Tag=nf; on Monday=am Montag=pf; on Sunday=am Sonntag=pf
in the evening=am Abend=pnf; in the morning=am Morgen=pnf; at night=in der Nacht=pn
tomorrow=morgen=f; next week=nächste Woche=f; soon=bald=f
"""


def _table(rows: str) -> dict[str, dict[str, str]]:
    """Read one line per case, one column per gender and the plural; "-" is an empty ending."""
    cases = ("nom", "acc", "dat", "gen")
    columns = (dict(zip("mfnp", line.split(), strict=True)) for line in rows.strip().split(";"))
    endings = ({key: value.strip("-") for key, value in column.items()} for column in columns)
    return dict(zip(cases, endings, strict=True))


_DEFINITE = _table("der die das die; den die das die; dem der dem den; des der des der")
_DER_WORD = _table("er e es e; en e es e; em er em en; es er es er")
_EIN_WORD = _table("- e - e; en e - e; em er em en; es er es er")
ADJECTIVE_ENDINGS = {
    "weak": _table("e e e en; en e e en; en en en en; en en en en"),
    "mixed": _table("er e es en; en e es en; en en en en; en en en en"),
    "strong": _table("er e es e; en e es e; em er em en; en er en er"),
}
RELATIVE = _table("der die das die; den die das die; dem der dem denen; dessen deren dessen deren")

# Finite forms for ich, du, er and the plural.
AUXILIARIES = {
    "haben": ("habe", "hast", "hat", "haben"),
    "sein": ("bin", "bist", "ist", "sind"),
    "war": ("war", "warst", "war", "waren"),
    "future": ("werde", "wirst", "wird", "werden"),
    "can": ("kann", "kannst", "kann", "können"),
    "must": ("muss", "musst", "muss", "müssen"),
    "want": ("will", "willst", "will", "wollen"),
    "should": ("soll", "sollst", "soll", "sollen"),
}
MODALS = ("can", "must", "want", "should")
CONTRACTIONS = {
    ("in", "dem"): "im",
    ("in", "das"): "ins",
    ("von", "dem"): "vom",
    ("zu", "dem"): "zum",
    ("zu", "der"): "zur",
}


@dataclass(frozen=True)
class Noun:
    """An English noun and its German counterpart with gender `m`, `f` or `n`; `tags` name its semantic kinds."""

    singular: str
    plural: str
    german: str
    german_plural: str
    gender: str
    tags: str

    @property
    def kind(self) -> str:
        return self.tags[0]

    def decline(self, case: Case, plural: bool) -> str:
        """German form for a case: weak masculines, genitive -s or -es, dative plural -n."""
        if plural:
            return self.german_plural + ("n" if case == "dat" and self.german_plural[-1] not in "ns" else "")
        if "w" in self.tags and case != "nom":
            return self.german_plural
        if case == "gen" and self.gender != "f":
            syllables = len(re.findall("[aeiouäöüy]+", self.german.lower()))
            return self.german + ("es" if syllables == 1 else "s")
        return self.german


@dataclass(frozen=True)
class Adjective:
    """An adjective: German predicate form, stem that takes endings, and the kinds of nouns it describes."""

    english: str
    german: str
    stem: str
    kinds: str


@dataclass(frozen=True)
class Determiner:
    """English forms (None where there is none) and the German word or stem.

    `pattern` is `definite`, `der` (takes the endings of dieser), `ein` (those of ein), `quantity` (plural, strong
    adjectives), `number` (not inflected) or `bare` (no article).
    """

    singular: str | None
    plural: str | None
    german: str
    pattern: str

    def decline(self, case: Case, column: str) -> str:
        if self.pattern in ("number", "bare"):
            return self.german
        if self.pattern == "definite":
            return _DEFINITE[case][column]
        return self.german + (_EIN_WORD if self.pattern == "ein" else _DER_WORD)[case][column]

    @property
    def adjective_pattern(self) -> str:
        return {"definite": "weak", "der": "weak", "ein": "mixed"}.get(self.pattern, "strong")


@dataclass(frozen=True)
class Verb:
    """A verb with its German conjugation and the frame it takes (see the comment above the table of verbs)."""

    english: str
    past: str
    infinitive: str
    prefix: str
    du_er: tuple[str, str] | None
    participle: str
    auxiliary: str
    frame: str
    preposition: str
    case: Case
    reflexive: bool
    subjects: str
    objects: str

    def german_present(self, person: int) -> str:
        """Finite form without the prefix; `person` counts ich, du, er, plural."""
        if person == 3:
            return self.infinitive
        if self.infinitive == "wissen" and person == 0:
            return "weiß"
        stem = self.infinitive.removesuffix("n") if self.infinitive.endswith("ern") else self.infinitive[:-2]
        if person == 0:
            return stem + "e"
        if self.du_er:
            return self.du_er[person - 1]
        # A sibilant swallows the s of the second person; after t, d or consonant + n an e eases the ending.
        link = "e" if re.search(r"[td]$|chn$|[^aeiouäöülrhn]n$", stem) else ""
        if person == 1:
            return stem + ("t" if stem[-1] in "sßzx" else link + "st")
        return stem + link + "t"

    def english_present(self, person: int) -> str:
        if person != 2:
            return self.english
        head, _, rest = self.english.partition(" ")
        if re.search(r"(s|sh|ch|x|o)$", head):
            head += "es"
        else:
            head = re.sub(r"(?<=[^aeiou])y$", "ie", head) + "s"
        return f"{head} {rest}".strip()


@dataclass(frozen=True)
class Time:
    """A time adverbial in both languages and the tenses it fits (letters p, n, f)."""

    english: str
    german: str
    tenses: str


def _noun(row: str) -> Noun:
    singular, plural, german, german_plural, gender, tags = row.split()
    return Noun(singular, plural, german, german_plural, gender, tags)


def _adjective(row: str) -> Adjective:
    english, german, kinds = row.split()
    predicate, _, stem = german.partition("/")
    return Adjective(english, predicate, stem or predicate, kinds)


def _verb(row: str) -> Verb:
    base, past, infinitive, irregular, participle, auxiliary, frame, kinds = row.split()
    prefix, _, stem = infinitive.rpartition("|")
    du, _, er = irregular.partition("/")
    subjects, _, objects = kinds.partition(">")
    frame, preposition, case = [*frame.removeprefix("refl-").split(":"), "", ""][:3]
    return Verb(
        english=base.replace("_", " "),
        past=past.replace("_", " "),
        infinitive=stem,
        prefix=prefix,
        du_er=(du, er) if er else None,
        participle=participle,
        auxiliary=auxiliary,
        frame=frame,
        preposition=preposition,
        case="dat" if frame == "dat" or case == "dat" else "acc",
        reflexive="refl-" in row,
        subjects=subjects,
        objects=objects,
    )


def _rows(text: str) -> list[str]:
    return [row.strip() for line in text.strip().splitlines() for row in line.split(";")]


NOUNS = tuple(_noun(row) for row in _rows(_NOUNS_TEXT))
ADJECTIVES = tuple(_adjective(row) for row in _rows(_ADJECTIVES_TEXT))
VERBS = tuple(_verb(row) for row in _rows(_VERBS_TEXT))
TIMES = tuple(Time(*row.split("=")) for row in _rows(_TIMES_TEXT))
DETERMINERS = {
    "the": Determiner("the", "the", "", "definite"),
    "this": Determiner("this", "these", "dies", "der"),
    "every": Determiner("every", None, "jed", "der"),
    "a": Determiner("a", None, "ein", "ein"),
    "no": Determiner("no", "no", "kein", "ein"),
    "my": Determiner("my", "my", "mein", "ein"),
    "your": Determiner("your", "your", "dein", "ein"),
    "his": Determiner("his", "his", "sein", "ein"),
    "her": Determiner("her", "her", "ihr", "ein"),
    "our": Determiner("our", "our", "unser", "ein"),
    "their": Determiner("their", "their", "ihr", "ein"),
    "two": Determiner(None, "two", "zwei", "number"),
    "three": Determiner(None, "three", "drei", "number"),
    "many": Determiner(None, "many", "viel", "quantity"),
    "some": Determiner(None, "some", "einig", "quantity"),
    "": Determiner("", "", "", "bare"),
}
PREPOSITIONS: dict[str, tuple[str, Case | None]] = {
    "in": ("in", None),
    "into": ("in", None),
    "on": ("auf", None),
    "onto": ("auf", None),
    "under": ("unter", None),
    "behind": ("hinter", None),
    "in front of": ("vor", None),
    "next to": ("neben", None),
    "through": ("durch", "acc"),
    "to": ("zu", "dat"),
    "from": ("aus", "dat"),
    "with": ("mit", "dat"),
    "without": ("ohne", "acc"),
}
"""German preposition and the case it governs; None for the two-way prepositions."""


@cache
def noun(form: str) -> tuple[Noun, bool]:
    """The noun with this English singular or plural, and whether the form is the plural.

    Raises:
        ValueError: no noun has this form.
    """
    for entry in NOUNS:
        if form in (entry.singular, entry.plural):
            return entry, form == entry.plural
    raise ValueError(f"no noun of the lexicon has the form {form!r}; see NOUNS in {__name__}")


@cache
def verb(english: str, german: str | None = None) -> Verb:
    """The verb with this English base; `german` tells homonyms apart (know: kennen, wissen).

    Raises:
        ValueError: no verb, or none with this German infinitive, has this base.
    """
    for entry in VERBS:
        if entry.english == english and german in (None, entry.prefix + entry.infinitive):
            return entry
    raise ValueError(f"no verb of the lexicon is {english!r} with the German {german!r}; see VERBS in {__name__}")


def adjective(english: str) -> Adjective:
    """The adjective with this English form; ValueError where there is none."""
    for entry in ADJECTIVES:
        if entry.english == english:
            return entry
    raise ValueError(f"no adjective of the lexicon is {english!r}; see ADJECTIVES in {__name__}")


def time(english: str) -> Time:
    """The time adverbial with this English form; ValueError where there is none."""
    for entry in TIMES:
        if entry.english == english:
            return entry
    raise ValueError(f"no time of the lexicon is {english!r}; see TIMES in {__name__}")
