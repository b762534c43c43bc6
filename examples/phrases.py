"""The built-in corpus: English sentences with numbers, dates, times and prices, and their German translations.

CLDR (through Babel) formats numbers, dates and units, and num2words spells numbers out. The sentences are the table
`TEMPLATES`. A template has slots; filling a slot yields the English and the German form of the same value, so that the
target is a function of the source. The seed determines the whole corpus.

`python -m examples.phrases FOLDER` writes the corpus to files for `ferryman corpus upload`; `--small` writes a corpus
that trains in a minute.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import string
import sys
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Final, Literal

from babel import Locale
from babel.dates import format_date, format_time, format_timedelta
from babel.numbers import format_currency, format_decimal, format_percent
from babel.units import format_unit
from num2words import num2words  # type: ignore[import-untyped]

ENGLISH: Final = "en_GB"
GERMAN: Final = "de"


@dataclass(frozen=True)
class Pair:
    """A piece of text in English (`source`) and in German (`target`)."""

    source: str
    target: str


@dataclass(frozen=True, kw_only=True)
class PhraseCorpus:
    """Three disjoint splits: every source sentence is unique."""

    train: Sequence[Pair]
    validation: Sequence[Pair]
    test: Sequence[Pair]


Slot = Callable[[Random], Pair]


# Numbers


def _both(write: Callable[[str], str]) -> Pair:
    """Return `write` applied to both locales."""
    return Pair(write(ENGLISH), write(GERMAN))


@functools.cache
def decimal(value: float) -> Pair:
    """Return 1234.5 as "1,234.5" and "1.234,5"."""
    return _both(lambda locale: format_decimal(value, locale=locale))


@functools.cache
def percent(tenths: int) -> Pair:
    """Return 34 (tenths of a percent) as "3.4%" and "3,4 %"."""
    return _both(lambda locale: format_percent(tenths / 1000, locale=locale, decimal_quantization=False))


@functools.cache
def price(cents: int, currency: str) -> Pair:
    """Return 124990 cents of EUR as "€1,249.90" and "1.249,90 €"."""
    return _both(lambda locale: format_currency(cents / 100, currency, locale=locale))


@functools.cache
def cardinal(value: int) -> Pair:
    """Return 42 as "forty-two" and "zweiundvierzig"."""
    return _both(lambda locale: num2words(value, lang=locale))


@functools.cache
def ordinal(value: int) -> Pair:
    """Return 23 as "twenty-third" and "dreiundzwanzigste" (with the ending that follows a definite article)."""
    return _both(lambda locale: num2words(value, lang=locale, to="ordinal"))


@functools.cache
def ordinal_number(value: int) -> Pair:
    """Return 23 as "23rd" and "23."."""
    return _both(lambda locale: num2words(value, lang=locale, to="ordinal_num"))


@functools.cache
def year_words(year: int) -> Pair:
    """Return 1987 as "nineteen eighty-seven" and "neunzehnhundertsiebenundachtzig"."""
    return _both(lambda locale: num2words(year, lang=locale, to="year"))


# Dates, times, durations


@functools.cache
def date(day: datetime.date, english: str, german: str) -> Pair:
    """Return the date by one CLDR pattern for each language."""
    return Pair(format_date(day, english, locale=ENGLISH), format_date(day, german, locale=GERMAN))


def clock(hour: int, minute: int) -> Pair:
    """Return 16:35 as "4:35 pm" and "16:35"; German sentences add "Uhr"."""
    time = datetime.time(hour, minute)
    return Pair(format_time(time, "h:mm a", locale=ENGLISH), format_time(time, "H:mm", locale=GERMAN))


def spoken_clock(hour: int, minutes: int) -> Pair:
    """Return the spoken time of day: `hour` 1 to 12, `minutes` -20 to 30 from the full hour."""
    english, german = cardinal(hour).source, cardinal(hour).target
    if minutes == 0:
        return Pair(f"{english} o'clock", f"{german.removesuffix('s') if hour == 1 else german} Uhr")
    if minutes == 30:
        return Pair(f"half past {english}", f"halb {cardinal(hour % 12 + 1).target}")
    amount = Pair("a quarter", "Viertel") if abs(minutes) == 15 else cardinal(abs(minutes))
    past = minutes > 0
    return Pair(
        f"{amount.source} {'past' if past else 'to'} {english}", f"{amount.target} {'nach' if past else 'vor'} {german}"
    )


@functools.cache
def unit(value: float, name: str, length: Literal["short", "long"] = "long") -> Pair:
    """Return a quantity by CLDR's name of the unit: (3, "duration-hour") as "3 hours" and "3 Stunden"."""
    return _both(lambda locale: format_unit(value, name, length, locale=locale))


@functools.cache
def dative_duration(value: int, name: str) -> Pair:
    """Return a duration in the dative, for "in", "vor" and "seit": (3, "year") as "3 years" and "3 Jahren".

    CLDR has the dative only in the phrase "in 3 Jahren". `value` must be less than one of the next larger unit.
    """
    span = datetime.timedelta(days=value * {"day": 1, "week": 7, "month": 30, "year": 365}[name])
    phrase = format_timedelta(span, threshold=1, add_direction=True, locale=GERMAN)
    return Pair(unit(value, f"duration-{name}").source, phrase.removeprefix("in "))


# Slots: how to draw each value


def _one_of(*pairs: tuple[str, str]) -> Slot:
    options = tuple(Pair(*pair) for pair in pairs)
    return lambda rng: options[rng.randrange(len(options))]


def _number(write: Callable[[int], Pair], low: int, high: int) -> Slot:
    return lambda rng: write(rng.randint(low, high))


def _count_of_things(rng: Random) -> Pair:
    """Return a count in words, never ending in 01, which German inflects before a noun."""
    number = rng.randint(2, 999)
    return cardinal(number + 1 if number % 100 == 1 else number)


def _digits_as_words(rng: Random) -> Pair:
    digits = [cardinal(rng.randint(0, 9)) for _ in range(3)]
    return Pair(" ".join(digit.source for digit in digits), " ".join(digit.target for digit in digits))


def _small_price(rng: Random) -> Pair:
    return price(rng.randrange(50, 100_00, 5), rng.choice(("EUR", "GBP", "USD")))


def _large_price(rng: Random) -> Pair:
    return price(rng.randint(10, 99) * 1000_00, rng.choice(("EUR", "CHF")))


def _percentage(rng: Random) -> Pair:
    return percent(rng.randint(1, 99) * 10 if rng.random() < 0.5 else rng.randint(1, 999))


def _day(english: str, german: str, first_year: int, last_year: int) -> Slot:
    first = datetime.date(first_year, 1, 1)
    days = (datetime.date(last_year, 12, 31) - first).days
    return lambda rng: date(first + datetime.timedelta(days=rng.randint(0, days)), english, german)


def _clock_between(first_hour: int, last_hour: int, minute_step: int) -> Slot:
    return lambda rng: clock(rng.randint(first_hour, last_hour), rng.randrange(0, 60, minute_step))


def _spoken_clock(rng: Random) -> Pair:
    return spoken_clock(rng.randint(1, 12), rng.choice((-20, -15, -10, -5, 0, 5, 10, 15, 20, 30)))


def _hours_and_minutes(rng: Random) -> Pair:
    hours, minutes = unit(rng.randint(1, 12), "duration-hour"), unit(rng.randint(1, 59), "duration-minute")
    return Pair(f"{hours.source} and {minutes.source}", f"{hours.target} und {minutes.target}")


def _any_duration(write: Callable[[int, str], Pair], *units: tuple[str, int, int]) -> Slot:
    """Return a slot that draws a unit (name, minimum, maximum) uniformly."""

    def draw(rng: Random) -> Pair:
        name, low, high = rng.choice(units)
        return write(rng.randint(low, high), name)

    return draw


def _quantity(name: str, low: int, high: int, step: int = 1) -> Slot:
    return lambda rng: unit(rng.randrange(low, high + 1, step), name)


def _cldr_names(kind: str, *codes: str) -> Slot:
    english, german = (getattr(Locale.parse(locale), kind) for locale in (ENGLISH, GERMAN))
    return _one_of(*((english[code], german[code]) for code in codes))


def _cldr_calendar(kind: str, first: int, last: int) -> Slot:
    english, german = (getattr(Locale.parse(locale), kind)["format"]["wide"] for locale in (ENGLISH, GERMAN))
    return _one_of(*((english[number], german[number]) for number in range(first, last + 1)))


SLOTS: Final[Mapping[str, Slot]] = {
    # numbers
    "small": _number(decimal, 2, 24),
    "hundreds": _number(decimal, 101, 999),
    "thousands": lambda rng: decimal(rng.randint(20, 999) * 50),
    "millions": lambda rng: decimal(rng.randint(10, 399) * 10_000),
    "extension": _number(decimal, 10, 99),
    "few_words": _number(cardinal, 2, 12),
    "age_words": _number(cardinal, 18, 99),
    "page_words": _number(cardinal, 2, 999),
    "count_words": _count_of_things,
    "digits_words": _digits_as_words,
    "ordinal_words": _number(ordinal, 1, 20),
    "day_words": _number(ordinal, 1, 28),
    "ordinal_digits": _number(ordinal_number, 1, 40),
    "percentage": _percentage,
    "price": _small_price,
    "large_price": _large_price,
    # dates and times
    "weekday": _cldr_calendar("days", 0, 6),
    "month": _cldr_calendar("months", 1, 12),
    "full_date": _day("EEEE, d MMMM y", "EEEE, d. MMMM y", 2024, 2029),
    "birth_date": _day("d MMMM y", "d. MMMM y", 1930, 2019),
    "day_and_month": _day("d MMMM", "d. MMMM", 2028, 2028),
    "year": _number(lambda year: Pair(str(year), str(year)), 1700, 2029),
    "year_words": _number(year_words, 1910, 1999),
    "time": _clock_between(0, 23, 1),
    "morning": _clock_between(6, 11, 5),
    "evening": _clock_between(15, 21, 5),
    "spoken_time": _spoken_clock,
    "hours_and_minutes": _hours_and_minutes,
    "short_duration": _any_duration(
        unit, ("duration-minute", 20, 90), ("duration-hour", 1, 12), ("duration-day", 1, 6)
    ),
    "coming_dative": _any_duration(dative_duration, ("day", 1, 6), ("week", 1, 4), ("month", 1, 11)),
    "past_dative": _any_duration(dative_duration, ("week", 1, 4), ("month", 1, 11), ("year", 1, 40)),
    # quantities
    "minutes": _quantity("duration-minute", 2, 59),
    "metres": _quantity("length-meter", 50, 950, 10),
    "kilometres": lambda rng: unit(rng.randint(30, 419) / 10, "length-kilometer"),
    "speed": _quantity("speed-kilometer-per-hour", 12, 150),
    "kilograms": _quantity("mass-kilogram", 2, 25),
    "grams": _quantity("mass-gram", 20, 950, 10),
    "temperature": lambda rng: unit(rng.randint(-25, 39), "temperature-celsius", "short"),
    "oven_temperature": lambda rng: unit(rng.randrange(120, 251, 5), "temperature-celsius", "short"),
    # names
    "country": _cldr_names("territories", "AT", "BE", "DK", "FI", "FR", "GR", "IE", "IT", "NO", "PL", "PT", "SE", "ES"),
    "language": _cldr_names("languages", "da", "el", "en", "fi", "fr", "it", "no", "pl", "pt", "es", "sv", "tr"),
    "city": _one_of(
        ("Berlin", "Berlin"),
        ("Hamburg", "Hamburg"),
        ("Munich", "München"),
        ("Cologne", "Köln"),
        ("Nuremberg", "Nürnberg"),
        ("Vienna", "Wien"),
        ("Zurich", "Zürich"),
        ("Geneva", "Genf"),
        ("Prague", "Prag"),
        ("Warsaw", "Warschau"),
        ("Milan", "Mailand"),
        ("Rome", "Rom"),
        ("Brussels", "Brüssel"),
        ("Copenhagen", "Kopenhagen"),
        ("Paris", "Paris"),
    ),
    # words; the suffix of a name is the German case or the preposition
    "vehicle": _one_of(
        ("The train", "Der Zug"),
        ("The bus", "Der Bus"),
        ("The night train", "Der Nachtzug"),
        ("The express train", "Der Schnellzug"),
        ("The coach", "Der Reisebus"),
        ("The tram", "Die Straßenbahn"),
    ),
    "building": _one_of(
        ("The hotel", "Das Hotel"),
        ("The town hall", "Das Rathaus"),
        ("The theatre", "Das Theater"),
        ("The hospital", "Das Krankenhaus"),
        ("The museum", "Das Museum"),
        ("The library", "Die Bibliothek"),
        ("The school", "Die Schule"),
        ("The pharmacy", "Die Apotheke"),
        ("The church", "Die Kirche"),
        ("The swimming pool", "Das Schwimmbad"),
    ),
    "event": _one_of(
        ("The meeting", "Die Sitzung"),
        ("The concert", "Das Konzert"),
        ("The course", "Der Kurs"),
        ("The lecture", "Der Vortrag"),
        ("The exam", "Die Prüfung"),
        ("The guided tour", "Die Führung"),
        ("The film", "Der Film"),
        ("The training", "Das Training"),
    ),
    "relative": _one_of(
        ("My sister", "Meine Schwester"),
        ("My brother", "Mein Bruder"),
        ("My grandmother", "Meine Großmutter"),
        ("My grandfather", "Mein Großvater"),
        ("My aunt", "Meine Tante"),
        ("My uncle", "Mein Onkel"),
        ("My cousin Anna", "Meine Cousine Anna"),
        ("My cousin Paul", "Mein Cousin Paul"),
        ("Our neighbour Mrs Weber", "Unsere Nachbarin Frau Weber"),
        ("Our neighbour Mr Schulz", "Unser Nachbar Herr Schulz"),
    ),
    "ware": _one_of(
        ("The coat", "Der Mantel"),
        ("The umbrella", "Der Regenschirm"),
        ("The lamp", "Die Lampe"),
        ("The handbag", "Die Handtasche"),
        ("The watch", "Die Uhr"),
        ("The shirt", "Das Hemd"),
        ("The dress", "Das Kleid"),
        ("The book", "Das Buch"),
        ("The chair", "Der Stuhl"),
        ("The radio", "Das Radio"),
    ),
    "wares": _one_of(
        ("books", "Bücher"),
        ("chairs", "Stühle"),
        ("tables", "Tische"),
        ("lamps", "Lampen"),
        ("pictures", "Bilder"),
        ("plants", "Pflanzen"),
        ("windows", "Fenster"),
        ("computers", "Computer"),
        ("clocks", "Uhren"),
        ("bottles", "Flaschen"),
    ),
    "fruit": _one_of(
        ("apples", "Äpfel"),
        ("pears", "Birnen"),
        ("cherries", "Kirschen"),
        ("potatoes", "Kartoffeln"),
        ("tomatoes", "Tomaten"),
        ("grapes", "Weintrauben"),
    ),
    "ingredient": _one_of(
        ("flour", "Mehl"),
        ("sugar", "Zucker"),
        ("butter", "Butter"),
        ("rice", "Reis"),
        ("cream cheese", "Frischkäse"),
        ("nuts", "Nüsse"),
    ),
    "ingredients": _one_of(
        ("eggs", "Eier"),
        ("onions", "Zwiebeln"),
        ("lemons", "Zitronen"),
        ("carrots", "Karotten"),
        ("peppers", "Paprikaschoten"),
    ),
    "bakery_accusative": _one_of(
        ("the cake", "den Kuchen"),
        ("the bread", "das Brot"),
        ("the pizza", "die Pizza"),
        ("the rolls", "die Brötchen"),
        ("the apple pie", "den Apfelkuchen"),
        ("the potatoes", "die Kartoffeln"),
    ),
    "property_accusative": _one_of(
        ("the house", "das Haus"),
        ("the flat", "die Wohnung"),
        ("the boat", "das Boot"),
        ("the garden", "den Garten"),
        ("the garage", "die Garage"),
        ("the painting", "das Gemälde"),
        ("the piano", "das Klavier"),
    ),
    "lock_accusative": _one_of(
        ("the front door", "die Haustür"),
        ("the garage", "die Garage"),
        ("the safe", "den Tresor"),
        ("the cellar", "den Keller"),
        ("the suitcase", "den Koffer"),
        ("the gate", "das Tor"),
    ),
    "medicine_accusative": _one_of(
        ("one tablet", "eine Tablette"),
        ("two capsules", "zwei Kapseln"),
        ("twenty drops", "zwanzig Tropfen"),
        ("a spoonful of syrup", "einen Löffel Sirup"),
        ("half a tablet", "eine halbe Tablette"),
    ),
    "in_place": _one_of(
        ("in the library", "In der Bibliothek"),
        ("in the school", "In der Schule"),
        ("in the museum", "Im Museum"),
        ("in the shop", "Im Geschäft"),
        ("in the office", "Im Büro"),
        ("in the warehouse", "Im Lager"),
        ("in the castle", "Im Schloss"),
    ),
    "transport_dative": _one_of(
        ("by bicycle", "mit dem Fahrrad"),
        ("by train", "mit dem Zug"),
        ("by car", "mit dem Auto"),
        ("by bus", "mit dem Bus"),
        ("by ship", "mit dem Schiff"),
        ("by plane", "mit dem Flugzeug"),
        ("on foot", "zu Fuß"),
    ),
}

# A slot with a digit, such as {city2}, draws a second, different value.
TEMPLATES: Final[Sequence[Pair]] = (
    # travel
    Pair(
        "{vehicle} to {city} leaves on {full_date} at {time}.",
        "{vehicle} nach {city} fährt am {full_date} um {time} Uhr ab.",
    ),
    Pair(
        "{vehicle} from {city} arrives at {time} on platform {small}.",
        "{vehicle} aus {city} kommt um {time} Uhr auf Gleis {small} an.",
    ),
    Pair(
        "The journey from {city} to {city2} takes {hours_and_minutes}.",
        "Die Fahrt von {city} nach {city2} dauert {hours_and_minutes}.",
    ),
    Pair("{vehicle} to {city} is {minutes} late.", "{vehicle} nach {city} hat {minutes} Verspätung."),
    Pair("Please change trains in {city} at {time}.", "Bitte steigen Sie um {time} Uhr in {city} um."),
    Pair("{building} is {metres} from the station.", "{building} liegt {metres} vom Bahnhof entfernt."),
    Pair(
        "Take the number {small} bus and get off at the {ordinal_words} stop.",
        "Nehmen Sie den Bus Nummer {small} und steigen Sie an der {ordinal_words}n Haltestelle aus.",
    ),
    # shopping
    Pair("{ware} costs {price}.", "{ware} kostet {price}."),
    Pair(
        "We paid {price} for {kilograms} of {fruit}.",
        "Wir haben für {kilograms} {fruit} {price} bezahlt.",
    ),
    Pair("You get a discount of {percentage} on all {wares}.", "Auf alle {wares} bekommen Sie {percentage} Rabatt."),
    Pair(
        "Please send us {count_words} {wares} by {day_and_month}.",
        "Bitte schicken Sie uns bis zum {day_and_month} {count_words} {wares}.",
    ),
    Pair(
        "{relative} paid {large_price} for {property_accusative}.",
        "{relative} hat für {property_accusative} {large_price} bezahlt.",
    ),
    Pair("In {month} prices rose by {percentage}.", "Im {month} sind die Preise um {percentage} gestiegen."),
    # weather
    Pair(
        "Tomorrow a temperature of {temperature} is expected in {city}.",
        "Morgen wird in {city} eine Temperatur von {temperature} erwartet.",
    ),
    Pair(
        "By {weekday} morning the temperature in {city} had fallen to {temperature}.",
        "Bis {weekday}morgen war die Temperatur in {city} auf {temperature} gefallen.",
    ),
    Pair(
        "The chance of rain on {weekday} is {percentage}.",
        "Die Regenwahrscheinlichkeit liegt am {weekday} bei {percentage}.",
    ),
    Pair(
        "On {weekday} the wind on the coast will reach {speed}.",
        "Am {weekday} erreicht der Wind an der Küste {speed}.",
    ),
    # calendar
    Pair("{event} begins on {weekday} at {spoken_time}.", "{event} beginnt am {weekday} um {spoken_time}."),
    Pair(
        "{event} begins in {coming_dative} and lasts {short_duration}.",
        "{event} beginnt in {coming_dative} und dauert {short_duration}.",
    ),
    Pair("{event} has been moved to {full_date}.", "{event} wurde auf {full_date} verschoben."),
    Pair(
        "{relative}'s birthday is on the {day_words} of {month}.",
        "{relative} hat am {day_words}n {month} Geburtstag.",
    ),
    Pair("{relative} was born on {birth_date}.", "{relative} wurde am {birth_date} geboren."),
    Pair("The {day_words} of {month} is a {weekday}.", "Der {day_words} {month} ist ein {weekday}."),
    Pair(
        "{building} is open from {morning} to {evening} on {weekday}.",
        "{building} ist am {weekday} von {morning} bis {evening} Uhr geöffnet.",
    ),
    Pair("{building} was built in {year}.", "{building} wurde {year} gebaut."),
    # people and places
    Pair("{relative} moved to {country} in {year_words}.", "{relative} ist {year_words} nach {country} gezogen."),
    Pair(
        "{relative} has lived in {country} for {past_dative}.",
        "{relative} lebt seit {past_dative} in {country}.",
    ),
    Pair(
        "{relative} has been learning {language} for {past_dative}.",
        "{relative} lernt seit {past_dative} {language}.",
    ),
    Pair("We moved to {city} {past_dative} ago.", "Wir sind vor {past_dative} nach {city} gezogen."),
    Pair("{relative} is {age_words} years old.", "{relative} ist {age_words} Jahre alt."),
    Pair("{city} has {millions} inhabitants.", "{city} hat {millions} Einwohner."),
    Pair(
        "{thousands} guests from {country} came to {city} in {month}.",
        "{thousands} Gäste aus {country} kamen im {month} nach {city}.",
    ),
    Pair(
        "{percentage} of the guests came {transport_dative}.",
        "{percentage} der Gäste sind {transport_dative} gekommen.",
    ),
    # office
    Pair(
        "Please call extension {extension} before {time}.",
        "Bitte rufen Sie vor {time} Uhr die Durchwahl {extension} an.",
    ),
    Pair("The code for {lock_accusative} is {digits_words}.", "Der Code für {lock_accusative} lautet {digits_words}."),
    Pair("Room {hundreds} is on the {ordinal_digits} floor.", "Zimmer {hundreds} liegt im {ordinal_digits} Stock."),
    Pair(
        "Chapter {few_words} begins on page {page_words}.",
        "Kapitel {few_words} beginnt auf Seite {page_words}.",
    ),
    Pair("There are {count_words} {wares} {in_place}.", "{in_place} gibt es {count_words} {wares}."),
    # kitchen, sport, health
    Pair(
        "Bake {bakery_accusative} for {minutes} at {oven_temperature}.",
        "Backen Sie {bakery_accusative} {minutes} bei {oven_temperature}.",
    ),
    Pair(
        "Add {grams} of {ingredient} and {few_words} {ingredients}.",
        "Geben Sie {grams} {ingredient} und {few_words} {ingredients} dazu.",
    ),
    Pair("{relative} ran {kilometres} in {minutes}.", "{relative} ist {kilometres} in {minutes} gelaufen."),
    Pair(
        "Take {medicine_accusative} every {few_words} hours for {few_words2} days.",
        "Nehmen Sie {few_words2} Tage lang alle {few_words} Stunden {medicine_accusative} ein.",
    ),
    Pair(
        "Our team won the {ordinal_words} game by {small} points.",
        "Unsere Mannschaft hat das {ordinal_words} Spiel mit {small} Punkten Vorsprung gewonnen.",
    ),
)


def slots_of(text: str) -> set[str]:
    """Return the names of the slots in one side of a template."""
    return {name for _, name, _, _ in string.Formatter().parse(text) if name}


def fill(template: Pair, rng: Random) -> Pair:
    """Return the template with drawn values; slots of one kind get different values."""
    drawn: dict[str, Pair] = {}
    for name in sorted(slots_of(template.source)):
        value = SLOTS[name.rstrip("2")](rng)
        while value in drawn.values():
            value = SLOTS[name.rstrip("2")](rng)
        drawn[name] = value
    source = template.source.format(**{name: value.source for name, value in drawn.items()})
    target = template.target.format(**{name: value.target for name, value in drawn.items()})
    return Pair(_plain(source), _plain(target))


def generate(
    *,
    seed: int,
    train: int = 30_000,
    validation: int = 500,
    test: int = 300,
    templates: Sequence[Pair] = TEMPLATES,
) -> PhraseCorpus:
    """Return a corpus with these numbers of pairs; equal arguments give equal corpora.

    The templates must have enough distinct sentences.
    """
    rng = Random(seed)
    target_of: dict[str, str] = {}
    while len(target_of) < train + validation + test:
        pair = fill(rng.choice(templates), rng)
        known = target_of.setdefault(pair.source, pair.target)
        assert known == pair.target, f"two translations of {pair.source!r}"
    pairs = [Pair(source, target) for source, target in target_of.items()]
    # Templates with few sentences are exhausted early; without shuffling, the last split would lack them.
    rng.shuffle(pairs)
    return PhraseCorpus(
        train=pairs[:train], validation=pairs[train : train + validation], test=pairs[train + validation :]
    )


def _plain(text: str) -> str:
    """Return the text in NFC with plain spaces: CLDR puts no-break spaces before units."""
    return unicodedata.normalize("NFC", text).replace("\u00a0", " ").replace("\u202f", " ")


def small_corpus() -> PhraseCorpus:
    """Return sentences about birthdays only: 3,360 exist, so that the test split has new combinations."""
    [birthdays] = [template for template in TEMPLATES if "birthday is on" in template.source]
    return generate(seed=1, train=2_000, validation=100, test=100, templates=[birthdays])


def write(corpus: PhraseCorpus, folder: Path) -> None:
    """Write train.en, train.de, val.en, val.de, test.en and test.de, one sentence a line."""
    folder.mkdir(parents=True, exist_ok=True)
    splits = {"train": corpus.train, "val": corpus.validation, "test": corpus.test}
    for name, pairs in splits.items():
        for language, side in (("en", "source"), ("de", "target")):
            text = "".join(f"{getattr(pair, side)}\n" for pair in pairs)
            (folder / f"{name}.{language}").write_text(text, encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.phrases", description="Write the corpus to files.")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="write train.en, train.de and so on to this folder")
    parser.add_argument("--small", action="store_true", help="write only 2,200 pairs about birthdays, which train fast")
    arguments = parser.parse_args(argv)
    corpus = small_corpus() if arguments.small else generate(seed=1)
    write(corpus, arguments.folder)
    print(f"{len(corpus.train):,} training, {len(corpus.validation)} validation and {len(corpus.test)} test pairs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
