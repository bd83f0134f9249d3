"""The training set of a run as its manifests tell it: one dataset or several."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ardist.config import canonical_digest
from ardist.config.data import DataConfig
from ardist.data.manifest import Manifest


@dataclass(frozen=True)
class TrainingSet:
    """Manifests of what is read, in the order of the configuration."""

    manifests: tuple[Manifest, ...]

    @property
    def digest(self) -> str:
        """Digest of the dataset, or of all datasets of a mixture in their order."""
        digests = [manifest.digest() for manifest in self.manifests]
        return digests[0] if len(digests) == 1 else canonical_digest(digests)

    def describe(self) -> dict[str, Any]:
        """What an export must know of the data the weights were trained on; the longest clips set its length."""
        longest = max(self.manifests, key=lambda manifest: manifest.shape[0])
        return {
            "id": [manifest.dataset_id for manifest in self.manifests],
            "shape": list(longest.shape),
            "classes": None if longest.classes is None else list(longest.classes),
            "vae_weights_digest": None if longest.vae is None else longest.vae.weights_digest,
        }


def paths(config: DataConfig) -> list[str]:
    """The datasets that a run reads."""
    return [part.path for part in config.mixture] if config.mixture else [config.path]
