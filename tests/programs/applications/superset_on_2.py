"""Superset 6.1, which is written for SQLAlchemy 1.4, on SQLAlchemy 2.0, as far as its metadata database goes.

Two names that 2.0 has dropped are put back; its ping of each new Connection, written for 1.4, is left out;
annotations that 2.0 would have as ``Mapped[]`` are passed over.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy.orm.decl_base
import sqlalchemy.orm.exc
import sqlalchemy.sql.visitors
import sqlalchemy.types

sqlalchemy.orm.eagerload = sqlalchemy.orm.joinedload  # type: ignore[attr-defined]
sqlalchemy.sql.visitors.VisitableType = sqlalchemy.types.TypeEngine  # type: ignore[attr-defined]
mapped_type = sqlalchemy.orm.decl_base._extract_mapped_subtype


def mapped_type_if_any(*arguments: Any, **options: Any) -> Any:
    try:
        return mapped_type(*arguments, **options)
    except sqlalchemy.orm.exc.MappedAnnotationError:
        return None


sqlalchemy.orm.decl_base._extract_mapped_subtype = mapped_type_if_any

# Only now, since its modules look up those names when they are imported.
import superset.initialization  # noqa: E402

superset.initialization.pessimistic_connection_handling = lambda engine: None

from superset.app import create_app  # noqa: E402, F401
