"""Check the headers of a model's weight files for the doctor."""

from __future__ import annotations

from kimi_mlx.cluster.hosts.findings import Finding
from kimi_mlx.errors import ConfigError, WeightsError
from kimi_mlx.model.config import load_config
from kimi_mlx.store.locate import config_folder
from kimi_mlx.store.model_ref import resolve_model_name
from kimi_mlx.store.store_folders import stored_ranks
from kimi_mlx.weights.layer_plan import check_checkpoint


def weights_findings(name: str, host: str) -> tuple[Finding, ...]:
    """Return the finding about a checkpoint's tensors; none if the model is not on this machine, or is a store.

    Args:
        name: alias, folder or repository of the model.
        host: name of this machine in the report.
    """
    folder = config_folder(resolve_model_name(name))
    if folder is None or stored_ranks(folder):
        return ()
    try:
        check_checkpoint(folder, load_config(folder))
    except (ConfigError, WeightsError) as error:
        return (Finding(host, "weights", "problem", error.message, error.hint),)
    return (Finding(host, "weights", "ok", "the weight files have the tensors of the model"),)
