"""Rows of models, their versions and their aliases <-> domain."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Final

from sqlalchemy import Connection, Row, func, insert, select, update

from ferryman_service.domain.errors import ModelNotFound
from ferryman_service.domain.models import (
    Int8Outcome,
    Int8Scores,
    Model,
    ModelAlias,
    ModelLineage,
    ModelReference,
    ModelScores,
    ModelVersion,
)
from ferryman_service.domain.recipe import recipe_from_dict, recipe_to_dict
from ferryman_service.stores import tables

_MODELS: Final = tables.models
_VERSIONS: Final = tables.model_versions
_ALIASES: Final = tables.model_aliases


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
    # A worker of the release before outlives the migration, and publishes without counting.
    latest = select(func.max(_VERSIONS.c.version)).where(_VERSIONS.c.name == name)
    return max(connection.execute(used).scalar() or 0, connection.execute(latest).scalar_one() or 0) + 1


def find_version(connection: Connection, reference: ModelReference, *, lock: bool = False) -> ModelVersion:
    """Return the version that the reference names, its row locked if asked for; raises ModelNotFound."""
    query = select(_VERSIONS).where(_VERSIONS.c.name == reference.name)
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
    return version_from_row(row)


def read_models(connection: Connection, names: Sequence[str]) -> list[Model]:
    """Return those of the models that have a version, by name."""
    aliases: defaultdict[str, list[ModelAlias]] = defaultdict(list)
    query = select(_ALIASES).where(_ALIASES.c.name.in_(names)).order_by(_ALIASES.c.name, _ALIASES.c.alias)
    for row in connection.execute(query):
        aliases[row.name].append(_alias_from_row(row))
    query = select(_VERSIONS).where(_VERSIONS.c.name.in_(names)).order_by(_VERSIONS.c.name, _VERSIONS.c.version)
    models = []
    for name, group in itertools.groupby(connection.execute(query), key=lambda row: row.name):
        rows = list(group)
        models.append(
            Model(
                name=name,
                latest_version=version_from_row(rows[-1]),
                versions=tuple(row.version for row in rows),
                aliases=tuple(aliases[name]),
            )
        )
    return models


def put_alias(connection: Connection, version: ModelVersion, alias: str) -> None:
    """Let the alias point at the version, wherever it pointed before."""
    values = {"version": version.version, "update_time_ns": time.time_ns()}
    of_alias = (_ALIASES.c.name == version.name) & (_ALIASES.c.alias == alias)
    if connection.execute(update(_ALIASES).where(of_alias).values(values)).rowcount == 0:
        connection.execute(insert(_ALIASES).values(name=version.name, alias=alias, **values))


def aliases_of(connection: Connection, version: ModelVersion) -> list[str]:
    """Return the aliases that point at the version, by name."""
    points = (_ALIASES.c.name == version.name) & (_ALIASES.c.version == version.version)
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


def version_from_row(row: Row[Any]) -> ModelVersion:
    """Return the version of a whole row."""
    return ModelVersion(
        name=row.name,
        version=row.version,
        lineage=ModelLineage(**row.lineage | {"recipe": recipe_from_dict(row.lineage["recipe"])}),
        scores=ModelScores(**row.scores),
        parameters=row.parameters,
        size_bytes=row.size_bytes,
        digest=row.digest,
        create_time_ns=row.create_time_ns,
        int8=None if row.int8 is None else Int8Outcome(**row.int8 | {"scores": Int8Scores(**row.int8["scores"])}),
    )


def _alias_from_row(row: Row[Any]) -> ModelAlias:
    return ModelAlias(alias=row.alias, version=row.version, update_time_ns=row.update_time_ns)
