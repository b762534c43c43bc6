"""The use cases of published models."""

from __future__ import annotations

from ferryman_service.application.paging import Page, Pager
from ferryman_service.application.ports import ModelStore
from ferryman_service.domain.models import Model, ModelVersion, parse_model_reference


class ModelUseCases:
    """What ModelService does."""

    def __init__(self, *, models: ModelStore, pager: Pager) -> None:
        """Store the ports."""
        self._models = models
        self._pager = pager

    def get(self, reference: str) -> tuple[Model, ModelVersion]:
        """Return a model and the version that is named; raises InvalidRequest, ModelNotFound."""
        parsed = parse_model_reference(reference)
        version = self._models.resolve(parsed)
        return self._models.get(parsed.name), version

    def list_page(self, page_size: int, page_token: str) -> Page[Model]:
        """Return a page of models, by name."""
        return self._pager.page(
            listing="models",
            page_size=page_size,
            page_token=page_token,
            fetch=self._models.list_page,
            key_of=lambda model: model.name,
        )
