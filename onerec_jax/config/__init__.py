"""Every setting of every stage: typed, documented and checked in one place.

`recipe.py` reads these from YAML.
"""

from onerec_jax.config.data import (
    AmazonSource,
    DataConfig,
    KuaiRandSource,
    ParquetSource,
    SimulatorSource,
    Source,
    SplitConfig,
)
from onerec_jax.config.evaluate import EvaluateConfig
from onerec_jax.config.experiment import Recipe, digest_of
from onerec_jax.config.faults import FaultsConfig
from onerec_jax.config.launch import ClusterConfig, GkeCluster, LocalCluster, SlurmCluster
from onerec_jax.config.model import ModelConfig, MoEConfig, TablesConfig
from onerec_jax.config.posttrain import RewardConfig, RLConfig, RSFTConfig, ShareCap
from onerec_jax.config.section import Section, setting
from onerec_jax.config.tokenizer import (
    RQVAE,
    AlignmentConfig,
    FiniteScalarQuantizer,
    Hierarchical,
    ProductQuantizer,
    QuantizerConfig,
    RandomIds,
    ResidualKMeans,
    SequentialIds,
    TokenizerConfig,
)
from onerec_jax.config.train import DistributedConfig, MeshConfig, TrainConfig

__all__ = [
    "RQVAE",
    "AlignmentConfig",
    "AmazonSource",
    "ClusterConfig",
    "DataConfig",
    "DistributedConfig",
    "EvaluateConfig",
    "FaultsConfig",
    "FiniteScalarQuantizer",
    "GkeCluster",
    "Hierarchical",
    "KuaiRandSource",
    "LocalCluster",
    "MeshConfig",
    "MoEConfig",
    "ModelConfig",
    "ParquetSource",
    "ProductQuantizer",
    "QuantizerConfig",
    "RLConfig",
    "RSFTConfig",
    "RandomIds",
    "Recipe",
    "ResidualKMeans",
    "RewardConfig",
    "Section",
    "SequentialIds",
    "ShareCap",
    "SimulatorSource",
    "SlurmCluster",
    "Source",
    "SplitConfig",
    "TablesConfig",
    "TokenizerConfig",
    "TrainConfig",
    "digest_of",
    "setting",
]
