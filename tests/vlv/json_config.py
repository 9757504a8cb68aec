"""An experiment from a JSON file: `tests/vlv/json_config.py:FILE`."""

import json
import pathlib

from ml_collections import ConfigDict


def get_config(file: str) -> ConfigDict:
    return ConfigDict(json.loads(pathlib.Path(file).read_text()))
