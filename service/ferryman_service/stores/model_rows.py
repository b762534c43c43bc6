"""Rows of models, their versions and their aliases <-> domain."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Final

from sqlalchemy import Connection, Row, and_, func, insert, select, update

from ferryman_service.domain.errors import ModelNotFound, TooManyAliases
from ferryman_service.domain.models import (
    Int8Outcome,
    Int8Scores,
    Model,
    ModelAlias,
    ModelLineage,
    ModelReference,
    ModelScores,
    ModelVersion,
    PublishedWeights,
)
from ferryman_service.domain.recipe import recipe_from_dict, recipe_to_dict
from ferryman_service.domain.stored import UnreadableRow, readable
from ferryman_service.stores import tables
from ferryman_service.stores.readable import note_unreadable, parse_row, read_row, require, shown

_MODELS: Final = tables.models
_VERSIONS: Final = tables.model_versions
_ALIASES: Final = tables.model_aliases
NUMBERED: Final = and_(
    func.typeof(_VERSIONS.c.version) == "integer",
    func.typeof(_VERSIONS.c.name) == "text",
    _VERSIONS.c.name.op("GLOB")("[a-z0-9]*"),
    _VERSIONS.c.name.op("NOT GLOB")("*[^a-z0-9._-]*"),
)
"""Whether a row has a model's name and a number. A version without is nobody's: no reference can name it."""
_MAX_ALIASES: Final = 100
"""Each answer that holds the model holds them all."""


def insert_version(connection: Connection, version: ModelVersion) -> None:
    """Insert a version with the number that `next_version` gave it; the number is never given again."""
    connection.execute(insert(_VERSIONS).values(_version_to_values(version)))
    of_model = _MODELS.c.name == version.name
    known = connection.execute(update(_MODELS).where(of_model).values(last_version=version.version))
    if known.rowcount == 0:
        connection.execute(insert(_MODELS).values(name=version.name, last_version=version.version))


def insert_rebuilt_version(connection: Connection, version: ModelVersion) -> None:
    """Insert a version whose row was lost; its number and all before it are never given again."""
    connection.execute(insert(_VERSIONS).values(_version_to_values(version)))
    of_model = _MODELS.c.name == version.name
    last = connection.execute(select(_MODELS.c.last_version).where(of_model)).scalar()
    if last is None:
        connection.execute(insert(_MODELS).values(name=version.name, last_version=version.version))
    elif last < version.version:
        connection.execute(update(_MODELS).where(of_model).values(last_version=version.version))


def next_version(connection: Connection, name: str) -> int:
    """Return the number of the model's next version: no version, deleted ones included, has had it."""
    used = select(_MODELS.c.last_version).where(_MODELS.c.name == name).with_for_update()
    # A repair of a damaged database may keep the versions and lose the row of their model.
    latest = select(func.max(_VERSIONS.c.version)).where(_VERSIONS.c.name == name, NUMBERED)
    return max(connection.execute(used).scalar() or 0, connection.execute(latest).scalar_one() or 0) + 1


def find_version(connection: Connection, reference: ModelReference) -> ModelVersion:
    """Return the version that the reference names; raises ModelNotFound, RowUnreadable."""
    return require(_version_from_row(connection, _find_row(connection, reference)))


def find_number(connection: Connection, name: str, number: int) -> int:
    """Return the number if the model has that version, readable or not, its row locked; raises ModelNotFound."""
    _find_row(connection, ModelReference(name=name, version=number), lock=True)
    return number


def check_alias(connection: Connection, name: str, alias: str) -> None:
    """Raise ModelNotFound unless the model has the alias; what it points at need not be readable."""
    of_alias = (_ALIASES.c.name == name) & (_ALIASES.c.alias == alias)
    if connection.execute(select(_ALIASES.c.alias).where(of_alias)).one_or_none() is None:
        raise _model_not_found(connection, ModelReference(name=name, alias=alias))


def _find_row(connection: Connection, reference: ModelReference, *, lock: bool = False) -> Row[Any]:
    query = select(_VERSIONS).where(_VERSIONS.c.name == reference.name, NUMBERED)
    if reference.version is not None:
        query = query.where(_VERSIONS.c.version == reference.version)
    if reference.alias is not None:
        of_alias = (_ALIASES.c.name == reference.name) & (_ALIASES.c.alias == reference.alias)
        query = query.where(_VERSIONS.c.version == select(_ALIASES.c.version).where(of_alias).scalar_subquery())
    if lock:
        query = query.with_for_update()
    row = connection.execute(query.order_by(_VERSIONS.c.version.desc()).limit(1)).one_or_none()
    if row is None:
        raise _model_not_found(connection, reference)
    return row


def read_models(connection: Connection, names: Sequence[str]) -> list[Model]:
    """Return those of the models that have a version, by name."""
    aliases: defaultdict[str, list[ModelAlias | UnreadableRow]] = defaultdict(list)
    query = select(_ALIASES).where(_ALIASES.c.name.in_(names)).order_by(_ALIASES.c.name, _ALIASES.c.alias)
    for row in connection.execute(query):
        aliases[row.name].append(_alias_from_row(connection, row))
    query = (
        select(_VERSIONS).where(_VERSIONS.c.name.in_(names), NUMBERED).order_by(_VERSIONS.c.name, _VERSIONS.c.version)
    )
    models = []
    for name, group in itertools.groupby(connection.execute(query), key=lambda row: row.name):
        versions = [_version_from_row(connection, row) for row in group]
        bad = [row for row in (*versions, *aliases[name]) if isinstance(row, UnreadableRow)]
        numbers = [int(row.place) if isinstance(row, UnreadableRow) else row.version for row in versions]
        models.append(
            Model(
                name=name,
                latest_version=versions[-1],
                versions=tuple(numbers),
                aliases=tuple(readable(aliases[name])),
                unreadable=tuple(f"{row.name}: in the database its {row.why}" for row in bad),
            )
        )
    return models


def note_nameless(connection: Connection) -> None:
    """Note the versions that no reference can name."""
    for row in connection.execute(select(_VERSIONS.c.name, _VERSIONS.c.version).where(NUMBERED.is_not(True))):
        name = f"{shown(row.name)}/{shown(row.version)}"
        why = "name or number is damaged, so nothing can name it"
        note_unreadable(connection, UnreadableRow(table=_VERSIONS.name, name=name, why=why))


def put_alias(connection: Connection, version: ModelVersion, alias: str) -> None:
    """Let the alias point at the version, wherever it pointed before; raises TooManyAliases."""
    values = {"version": version.version, "update_time_ns": time.time_ns()}
    of_alias = (_ALIASES.c.name == version.name) & (_ALIASES.c.alias == alias)
    if connection.execute(update(_ALIASES).where(of_alias).values(values)).rowcount == 0:
        count = select(func.count()).select_from(_ALIASES).where(_ALIASES.c.name == version.name)
        if connection.execute(count).scalar_one() >= _MAX_ALIASES:
            text = f"model {version.name!r} has {_MAX_ALIASES} aliases, which is the limit: delete one of them"
            raise TooManyAliases(text, model=version.name, limit=_MAX_ALIASES)
        connection.execute(insert(_ALIASES).values(name=version.name, alias=alias, **values))


def aliases_of(connection: Connection, name: str, number: int) -> list[str]:
    """Return the aliases that point at the version, by name."""
    points = (_ALIASES.c.name == name) & (_ALIASES.c.version == number)
    return list(connection.execute(select(_ALIASES.c.alias).where(points).order_by(_ALIASES.c.alias)).scalars())


def _model_not_found(connection: Connection, reference: ModelReference) -> ModelNotFound:
    """Return an error that says what there is instead."""
    model = next(iter(read_models(connection, [reference.name])), None)
    if model is None:
        text = f"there is no model {reference.name!r}: ListModels names those there are"
    elif reference.alias is not None:
        known = ", ".join(alias.alias for alias in model.aliases) or "none"
        text = f"model {model.name!r} has no alias {reference.alias!r}: its aliases are {known}"
    else:
        known = ", ".join(map(str, model.versions))
        text = f"model {model.name!r} has no version {reference.version}: its versions are {known}"
    return ModelNotFound(text, model=reference)


def _version_to_values(version: ModelVersion) -> dict[str, Any]:
    values = dataclasses.asdict(version)
    values["lineage"]["recipe"] = recipe_to_dict(version.lineage.recipe)
    return values


def _version_from_row(connection: Connection, row: Row[Any]) -> ModelVersion | UnreadableRow:
    name = f"{shown(row.name)}/{row.version}"
    return read_row(connection, _VERSIONS, row, _parse_version, name, place=str(row.version))


def parse_version_row(row: Row[Any]) -> ModelVersion:
    """Return the version of a whole row; raises one of `UNPARSABLE`."""
    return parse_row(_VERSIONS, row, _parse_version)


def _parse_version(row: Row[Any]) -> ModelVersion:
    return ModelVersion(
        name=row.name,
        version=row.version,
        lineage=ModelLineage(**row.lineage | {"recipe": recipe_from_dict(row.lineage["recipe"])}),
        scores=ModelScores(**row.scores | {"weights": PublishedWeights(row.scores["weights"])}),
        parameters=row.parameters,
        size_bytes=row.size_bytes,
        digest=row.digest,
        create_time_ns=row.create_time_ns,
        int8=None if row.int8 is None else Int8Outcome(**row.int8 | {"scores": Int8Scores(**row.int8["scores"])}),
    )


def _alias_from_row(connection: Connection, row: Row[Any]) -> ModelAlias | UnreadableRow:
    return read_row(connection, _ALIASES, row, _parse_alias, f"{shown(row.name)}@{shown(row.alias)}")


def _parse_alias(row: Row[Any]) -> ModelAlias:
    return ModelAlias(alias=row.alias, version=row.version, update_time_ns=row.update_time_ns)
