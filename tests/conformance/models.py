"""Types as applications declare them, for structured output: models, unions, recursion, dates, decimals, tuples."""

import dataclasses
import datetime
import enum
import ipaddress
import uuid
from decimal import Decimal
from typing import Annotated, Any, Generic, Literal, NamedTuple, NotRequired, Optional, Required, TypeVar

from pydantic import AliasChoices, AnyUrl, BaseModel, ConfigDict, Field, HttpUrl, RootModel, SecretStr, Tag
from pydantic.alias_generators import to_camel
from typing_extensions import TypedDict

Name = Annotated[str, Field(min_length=1, max_length=16)]
Text = Annotated[str, Field(max_length=24)]
Slug = Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]{1,11}$")]
Percent = Annotated[int, Field(ge=0, le=100)]
Positive = Annotated[int, Field(gt=0, lt=10_000)]
Cents = Annotated[Decimal, Field(max_digits=8, decimal_places=2)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Camel(BaseModel):
    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True)


# People and organisations
class Person(BaseModel):
    name: Name
    age: int = Field(ge=0, le=120)


class Contact(BaseModel):
    name: Name
    email: str = Field(pattern=r"^[^@\s]+@[^@\s]+\.[a-z]{2,4}$", max_length=40)
    phone: str | None = Field(default=None, pattern=r"^\+?[0-9 -]{6,15}$")


class PostalAddress(Strict):
    street: Text
    house_number: Annotated[str, Field(pattern=r"^\d{1,3}[a-c]?$")]
    postcode: Annotated[str, Field(pattern=r"^\d{5}$")]
    country: Literal["DE", "FR", "NL", "ES"] = "DE"


class Department(enum.StrEnum):
    SALES = "sales"
    RESEARCH = "research"
    SUPPORT = "support"


class Employee(BaseModel):
    """Somebody who works for us."""

    id: uuid.UUID
    name: Name
    department: Department
    hired: datetime.date
    salary: Cents
    address: PostalAddress
    manager: Optional["Employee"] = None


class Team(BaseModel):
    lead: Person
    members: list[Person] = Field(min_length=1, max_length=3)


class Organisation(Camel):
    legal_name: Name
    founded_in: int = Field(ge=1800, le=2100)
    is_listed: bool
    head_quarters: PostalAddress


class Candidate(BaseModel):
    name: Name
    years_of_experience: float = Field(ge=0, le=50)
    skills: list[Name] = Field(max_length=4)
    languages: dict[Literal["en", "de", "fr"], Literal["A1", "B2", "C2"]]
    seniority: Literal["junior", "senior", "lead"]


class Resume(BaseModel):
    class Job(BaseModel):
        employer: Name
        start: datetime.date
        end: datetime.date | None

    person: Person
    jobs: list[Job] = Field(max_length=2)


class Signature(NamedTuple):
    name: str
    signed: bool


class Contract(BaseModel):
    parties: tuple[Name, Name]
    signatures: list[Signature] = Field(max_length=2)
    valid_until: datetime.datetime


# Commerce
class Currency(enum.Enum):
    EUR = "EUR"
    USD = "USD"
    CNY = "CNY"


class Money(BaseModel):
    amount: Cents
    currency: Currency


class LineItem(BaseModel):
    sku: Annotated[str, Field(pattern=r"^[A-Z]{2}-\d{4}$")]
    quantity: Positive
    unit_price: Money


class Order(BaseModel):
    id: uuid.UUID
    items: list[LineItem] = Field(min_length=1, max_length=2)
    placed_at: datetime.datetime
    note: str | None = Field(None, max_length=24)


class Invoice(Camel):
    invoice_number: Annotated[str, Field(pattern=r"^INV-\d{6}$")]
    issue_date: datetime.date
    due_date: datetime.date
    line_items: list[LineItem] = Field(max_length=2)
    total: Money


class Discount(BaseModel):
    code: Annotated[str, Field(min_length=4, max_length=8, pattern="^[A-Z0-9]+$")]
    percent: Percent
    stackable: bool = False


class Card(BaseModel):
    method: Literal["card"]
    last4: Annotated[str, Field(pattern=r"^\d{4}$")]
    expires: Annotated[str, Field(pattern=r"^(0[1-9]|1[0-2])/\d{2}$")]


class Transfer(BaseModel):
    method: Literal["transfer"]
    iban: Annotated[str, Field(pattern=r"^[A-Z]{2}\d{20}$")]


class Wallet(BaseModel):
    method: Literal["wallet"]
    provider: Literal["alipay", "paypal"]


class Payment(BaseModel):
    amount: Money
    how: Annotated[Card | Transfer | Wallet, Field(discriminator="method")]


class Refund(BaseModel):
    payment: uuid.UUID
    amount: Cents
    reason: Literal["duplicate", "fraudulent", "requested"] | None = None


class Product(BaseModel):
    name: Name
    price: Cents
    tags: set[Slug] = Field(default_factory=set, max_length=3)
    dimensions: tuple[float, float, float] | None = None
    attributes: dict[Name, str | int | bool] = Field(default={}, max_length=2)


class Review(BaseModel):
    stars: Literal[1, 2, 3, 4, 5]
    title: Text
    pros: list[Text] = Field(default=[], max_length=2)
    cons: list[Text] = Field(default=[], max_length=2)


class Shipment(BaseModel):
    carrier: Literal["dhl", "ups", "sf"]
    tracking: Annotated[str, Field(min_length=8, max_length=12)]
    eta: datetime.date | None
    weight_kg: Annotated[float, Field(gt=0, le=70)]


class Subscription(BaseModel):
    plan: Literal["free", "pro", "team"]
    seats: Annotated[int, Field(ge=1, le=500)]
    renews: datetime.date
    trial_days: Annotated[int, Field(multiple_of=7, ge=0, le=28)] = 0


class Cart(RootModel[dict[Slug, Positive]]):
    pass


# What language models are asked for
class Sentiment(BaseModel):
    label: Literal["positive", "negative", "neutral"]
    confidence: Annotated[float, Field(ge=0, le=1)]


class Classification(BaseModel):
    category: Literal["billing", "technical", "sales", "other"]
    urgent: bool
    summary: Text


class Entity(BaseModel):
    text: Name
    kind: Literal["person", "place", "organisation", "date"] = Field(alias="type")
    span: tuple[int, int]


class Entities(BaseModel):
    entities: list[Entity] = Field(max_length=3)


class Triple(NamedTuple):
    subject: str
    predicate: str
    object: str


class KnowledgeGraph(BaseModel):
    triples: list[Triple] = Field(max_length=2)


class Step(BaseModel):
    thought: Text
    result: Text


class Solution(BaseModel):
    steps: list[Step] = Field(min_length=1, max_length=3)
    final_answer: Text


class Verdict(BaseModel):
    reasoning: str = Field(max_length=40, description="Think step by step.")
    score: Annotated[int, Field(ge=1, le=10)]
    passed: bool


class Translation(BaseModel):
    source: Literal["en"]
    target: Literal["zh", "fr"]
    text: Text


class Question(BaseModel):
    question: Text
    options: Annotated[list[Text], Field(min_length=2, max_length=4)]
    correct: Annotated[int, Field(ge=0, le=3)]


class Quiz(BaseModel):
    title: Text
    questions: list[Question] = Field(min_length=1, max_length=2)


class Citation(BaseModel):
    source: HttpUrl
    quote: Text
    page: int | None = None


class Answer(BaseModel):
    answer: Text
    citations: list[Citation] = Field(default=[], max_length=1)
    follow_up: Optional[Text] = None  # noqa: UP045


class Summary(BaseModel):
    headline: Annotated[str, Field(max_length=30)]
    bullets: Annotated[list[Annotated[str, Field(max_length=30)]], Field(min_length=3, max_length=3)]


class Moderation(BaseModel):
    flagged: bool
    scores: dict[Literal["hate", "violence", "spam"], Annotated[float, Field(ge=0, le=1)]]


class SearchQuery(BaseModel):
    """A query rewritten for a search engine."""

    query: Text
    filters: dict[Slug, str | int] | None = Field(None, max_length=2)
    date_range: tuple[datetime.date, datetime.date] | None = None
    limit: Percent = 10


class Persona(BaseModel):
    name: Name
    traits: frozenset[Literal["kind", "bold", "shy", "calm"]]
    birthday: datetime.date


# Expressions, trees, graphs
class Tree(BaseModel):
    value: Percent
    children: list["Tree"] = Field(default=[], max_length=2)


class Linked(BaseModel):
    value: Percent
    next: Optional["Linked"] = None


class Menu(Strict):
    label: Name
    items: "list[Menu | Name]" = Field(default=[], max_length=2)


class Comment(BaseModel):
    author: Name
    body: Text
    replies: "list[Comment]" = Field([], max_length=1)


class File(BaseModel):
    type: Literal["file"]
    name: Name
    size: Positive


class Folder(BaseModel):
    type: Literal["folder"]
    name: Name
    entries: "list[Annotated[File | Folder, Field(discriminator='type')]]" = Field(max_length=2)


class Number(BaseModel):
    op: Literal["number"]
    value: Percent


class Sum(BaseModel):
    op: Literal["sum"]
    left: "Expression"
    right: "Expression"


class Negation(BaseModel):
    op: Literal["negation"]
    operand: "Expression"


Expression = Annotated[Number | Sum | Negation, Field(discriminator="op")]
Sum.model_rebuild()
Negation.model_rebuild()


class Equals(BaseModel):
    field: Slug
    equals: str | int | bool


class Both(BaseModel):
    all_of: "list[Condition]" = Field(alias="and", max_length=2)


class Either(BaseModel):
    any_of: "list[Condition]" = Field(alias="or", max_length=2)


Condition = Equals | Both | Either
Both.model_rebuild()
Either.model_rebuild()


class Edge(NamedTuple):
    start: int
    end: int
    weight: float = 1.0


class Graph(BaseModel):
    nodes: list[Percent] = Field(max_length=4)
    edges: list[Edge] = Field(max_length=3)


class Husband(BaseModel):
    name: Name
    wife: Optional["Wife"] = None


class Wife(BaseModel):
    name: Name
    husband: Husband | None = None


Husband.model_rebuild()


# Events and things
class Created(BaseModel):
    event: Literal["created"]
    id: int
    at: datetime.datetime


class Renamed(BaseModel):
    event: Literal["renamed"]
    id: int
    old: Name
    new: Name


class Deleted(BaseModel):
    event: Literal["deleted"]
    id: int
    reason: str | None = Field(max_length=20)


Event = Annotated[Created | Renamed | Deleted, Field(discriminator="event")]


class Log(BaseModel):
    level: Literal["debug", "info", "error"]
    at: datetime.datetime
    message: Text
    context: dict[str, Any] | None = None


class Meeting(BaseModel):
    title: Text
    start: datetime.datetime
    duration: datetime.timedelta
    attendees: list[Name] = Field(max_length=3)


class OpeningHours(BaseModel):
    monday: tuple[datetime.time, datetime.time] | None
    sunday: tuple[datetime.time, datetime.time] | None


class Flight(BaseModel):
    number: Annotated[str, Field(pattern=r"^[A-Z]{2}\d{3,4}$")]
    origin: Annotated[str, Field(pattern="^[A-Z]{3}$")] = Field(alias="from")
    to: Annotated[str, Field(pattern="^[A-Z]{3}$")]
    departs: datetime.datetime
    seats: dict[Literal["economy", "business"], Percent]


class Weather(Camel):
    city_name: Name
    temperature: Annotated[float, Field(ge=-60, le=60)]
    wind_direction: Literal["N", "E", "S", "W"]
    chance_of_rain: Percent | None = None


class Recipe(BaseModel):
    class Ingredient(BaseModel):
        name: Name
        amount: float = Field(gt=0)
        unit: Literal["g", "ml", "piece"]

    title: Text
    servings: Annotated[int, Field(ge=1, le=12)]
    ingredients: list[Ingredient] = Field(min_length=1, max_length=2)
    minutes: Annotated[int, Field(multiple_of=5, ge=5, le=240)]


class Sensor(BaseModel):
    id: Annotated[str, Field(pattern=r"^[0-9a-f]{8}$")]
    readings: Annotated[list[float], Field(min_length=1, max_length=3)]
    location: tuple[Annotated[float, Field(ge=-90, le=90)], Annotated[float, Field(ge=-180, le=180)]]


class Colour(enum.IntEnum):
    RED = 1
    GREEN = 2
    BLUE = 3


class Pixel(BaseModel):
    x: Positive
    y: Positive
    colour: Colour
    alpha: Annotated[float, Field(ge=0, le=1, multiple_of=0.25)] = 1.0


class Circle(BaseModel):
    kind: Literal["circle"] = "circle"
    radius: Annotated[float, Field(gt=0)]


class Rectangle(BaseModel):
    kind: Literal["rectangle"] = "rectangle"
    width: Annotated[float, Field(gt=0)]
    height: Annotated[float, Field(gt=0)]


class Drawing(BaseModel):
    shapes: list[Circle | Rectangle] = Field(max_length=2)
    background: Annotated[str, Field(pattern="^#[0-9a-f]{6}$")] = "#ffffff"


class Host(BaseModel):
    name: Annotated[str, Field(pattern=r"^[a-z0-9-]+(\.[a-z0-9-]+)*$", max_length=24)]
    address: ipaddress.IPv4Address
    ports: list[Annotated[int, Field(ge=1, le=65535)]] = Field(max_length=3)


class Network(BaseModel):
    gateway: ipaddress.IPv6Address | ipaddress.IPv4Address
    subnet: ipaddress.IPv4Network


class Login(BaseModel):
    user: Name
    password: SecretStr = Field(min_length=8, max_length=16)
    remember: bool = False


class Bookmark(BaseModel):
    url: AnyUrl
    title: Text | None = None
    added: datetime.date = Field(default_factory=datetime.date.today)


class Patient(BaseModel):
    name: Name
    blood: Literal["A", "B", "AB", "0"]
    allergies: list[Name] | None = Field(None, max_length=2)
    vitals: "Vitals"


class Vitals(BaseModel):
    pulse: Annotated[int, Field(ge=30, le=220)]
    temperature: Annotated[Decimal, Field(ge=34, le=43, decimal_places=1)]


Patient.model_rebuild()


class Song(BaseModel):
    title: Text
    seconds: Annotated[int, Field(ge=1, le=3600)]
    bpm: Annotated[int, Field(strict=True, ge=40, le=240)] | None = None


class Playlist(BaseModel):
    name: Name
    songs: list[Song] = Field(max_length=2)
    public: bool = True


class Vote(BaseModel):
    choice: Literal["yes", "no", None]
    weight: float | int = 1


class Setting(BaseModel):
    key: Slug
    value: bool | int | float | str | None


class Config(BaseModel):
    model_config = ConfigDict(extra="allow")
    version: Literal[1, 2]
    debug: bool = False


class Range(BaseModel):
    low: int = Field(validation_alias=AliasChoices("low", "from"))
    high: int


class Version(RootModel[Annotated[str, Field(pattern=r"^\d{1,2}\.\d{1,2}\.\d{1,2}$")]]):
    pass


class Matrix(RootModel[Annotated[list[tuple[int, int]], Field(min_length=2, max_length=2)]]):
    pass


class Chess(BaseModel):
    move: Annotated[str, Field(pattern=r"^[a-h][1-8][a-h][1-8][qrbn]?$")]
    check: bool


class Dna(BaseModel):
    sequence: Annotated[str, Field(pattern="^[ACGT]{8,16}$")]
    organism: Name


class Dice(BaseModel):
    rolls: Annotated[list[Annotated[int, Field(ge=1, le=6)]], Field(min_length=2, max_length=5)]


class 城市(BaseModel):
    名称: Name
    人口: Annotated[int, Field(ge=1, le=50_000_000)]
    省份: Literal["北京", "上海", "广东"]


class Größe(BaseModel):
    höhe: Percent
    breite: Percent = Field(alias="breite in cm")


# Generic, dataclasses, typed dictionaries
T = TypeVar("T")


class Page(BaseModel, Generic[T]):
    items: list[T] = Field(max_length=2)
    total: int = Field(ge=0)
    next_cursor: str | None = Field(None, max_length=8)


class Result(BaseModel, Generic[T]):
    ok: Literal[True]
    value: T


class Failure(BaseModel):
    ok: Literal[False]
    error: Text


@dataclasses.dataclass
class Point:
    x: float
    y: float
    label: str = ""


@dataclasses.dataclass
class Polygon:
    points: Annotated[list[Point], Field(min_length=1, max_length=2)]
    closed: bool = True


@dataclasses.dataclass
class Part:
    name: Name
    sizes: tuple[Percent, Percent]
    parent: "Part | None" = None


class Movie(TypedDict, total=False):
    title: Required[Text]
    year: Annotated[int, Field(ge=1888, le=2100)]
    genres: Annotated[list[Literal["drama", "comedy"]], Field(max_length=2)]


class Book(TypedDict):
    title: Text
    isbn: Annotated[str, Field(pattern=r"^97[89]\d{10}$")]
    pages: NotRequired[Positive]


class Library(TypedDict):
    books: Annotated[list[Book], Field(max_length=2)]
    by_shelf: dict[Slug, Percent]


class Base(BaseModel):
    id: int
    created: datetime.datetime


class Derived(Base):
    title: Text


class Deep(BaseModel):
    class A(BaseModel):
        class B(BaseModel):
            class C(BaseModel):
                leaf: Percent

            c: C

        b: B

    a: A


class Optionals(BaseModel):
    a: int | None = None
    b: str | None = Field(None, max_length=8)
    c: list[int] | None = Field(None, max_length=2)
    d: bool | None = None


class Anything(BaseModel):
    payload: Any
    kind: Literal["raw"]


class Bytes(BaseModel):
    data: Annotated[bytes, Field(max_length=12)]


class Stamped(BaseModel):
    when: datetime.datetime | datetime.date
    zone: Literal["UTC", "CET"]


class Tagged(BaseModel):
    pet: (
        Annotated[str, Tag("name"), Field(max_length=8)]
        | Annotated[int, Tag("number")]
        | Annotated[list[Percent], Tag("list"), Field(max_length=2)]
    )


class Described(BaseModel):
    """A model whose fields are described at length, as for a language model."""

    model_config = ConfigDict(title="Described thing", json_schema_extra={"examples": [{"level": 3}]})
    level: int = Field(ge=1, le=5, title="Level", description='From "1" to 5.', examples=[3], deprecated=True)
    remark: str = Field("none", max_length=12, description="With {braces}, \\backslashes\\ and 中文.")


#: as they are given to `structured_generate`
PLAIN: tuple[Any, ...] = (
    bool, int, float, Literal["yes", "no"], Literal[1, 2, 3], int | None, str | int, list[bool] | bool, Decimal, Name,
    datetime.date, datetime.datetime, datetime.time, datetime.timedelta, uuid.UUID, ipaddress.IPv4Address, Colour,
    Department, Currency, Percent, Positive, Cents, Slug, Text, Version, Matrix, Cart, Point, Polygon, Part, Movie,
    Book, Library, Edge, Triple, Signature, Event, Expression, Condition,
)  # fmt: skip
COMPOUND: dict[str, Any] = {
    "list of people": Annotated[list[Person], Field(min_length=1, max_length=2)],
    "list of events": Annotated[list[Event], Field(max_length=2)],
    "list of enums": Annotated[list[Colour], Field(min_length=1, max_length=3)],
    "set of enums": Annotated[set[Colour], Field(min_length=1, max_length=3)],
    "set of slugs": Annotated[frozenset[Slug], Field(min_length=1, max_length=2)],
    "map to numbers": Annotated[dict[str, int], Field(min_length=1, max_length=2)],
    "map to models": Annotated[dict[Slug, Person], Field(min_length=1, max_length=1)],
    "map of literals": dict[Literal["a", "b"], Percent],
    "map of enums": dict[Department, bool],
    "pair": tuple[Name, Percent],
    "triple with an option": tuple[Percent, bool, Percent | None],
    "tuple of models": tuple[Person, Money],
    "any length of numbers": Annotated[tuple[Percent, ...], Field(max_length=3)],
    "list of lists": Annotated[list[Annotated[list[Percent], Field(max_length=2)]], Field(max_length=2)],
    "list of pairs": Annotated[list[tuple[Percent, Percent]], Field(min_length=1, max_length=2)],
    "list of maps": Annotated[list[dict[Literal["x", "y"], Percent]], Field(max_length=2)],
    "a model or nothing": Person | None,
    "one of three models": Person | Money | Weather,
    "success or failure": Result[Percent] | Failure,
    "page of numbers": Page[Percent],
    "page of people": Page[Person],
    "page of pages": Page[Page[Percent]],
    "result of a list": Result[Annotated[list[Name], Field(max_length=2)]],
    "result of a tree": Result[Tree],
    "short list": Annotated[list[Percent], Field(min_length=2, max_length=2)],
    "long minimum": Annotated[list[bool], Field(min_length=20, max_length=20)],
    "short text": Annotated[str, Field(min_length=3, max_length=3)],
    "hex colour": Annotated[str, Field(pattern="^#[0-9A-F]{6}$")],
    "semantic version": Annotated[str, Field(pattern=r"^v?\d+\.\d+\.\d+(-[a-z]+)?$", max_length=16)],
    "pattern inside": Annotated[str, Field(pattern=r"\d{2}", max_length=10)],
    "time of day": Annotated[str, Field(pattern=r"^([01]\d|2[0-3]):[0-5]\d$")],
    "even number": Annotated[int, Field(multiple_of=2, ge=0, le=50)],
    "open interval": Annotated[float, Field(gt=0, lt=1)],
    "negative": Annotated[int, Field(lt=0, ge=-50)],
    "big number": Annotated[int, Field(ge=10**12, le=10**13)],
    "look-ahead": Annotated[str, Field(json_schema_extra={"pattern": r"^(?=.*\d)[a-z0-9]{8}$"})],
    "word boundary": Annotated[str, Field(json_schema_extra={"pattern": r"\bcat\b"}, max_length=12)],
    "case-insensitive": Annotated[str, Field(json_schema_extra={"pattern": r"(?i)^yes|no$"}, max_length=8)],
}


def all_types() -> dict[str, Any]:
    """Every type of this module by a name: the models, the plain types and the compounds."""
    helpers = (Strict, Camel, BaseModel, RootModel, Version, Matrix, Cart, Page, Result)
    found: dict[str, Any] = {}
    for name, value in list(globals().items()):
        if isinstance(value, type) and issubclass(value, BaseModel) and value not in helpers:
            found[name] = value
    for number, kind in enumerate(PLAIN):
        found[f"{number} {getattr(kind, '__name__', kind)}"[:40]] = kind
    return found | COMPOUND
