from ml_collections import ConfigDict


def get_config(variant: str = "") -> ConfigDict:
    return ConfigDict({
        "run": {"steps": 1, "mesh": {"data": -1}, "fault": variant, "culprit": 1}
    })  # fmt: skip
