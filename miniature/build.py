"""`python -m miniature.build --data_dir DIR [--builder full|smoke|...]`: writes the data set."""

from absl import app, flags, logging

_DATA_DIR = flags.DEFINE_string("data_dir", "runs/miniature_world", "Where data sets live.")
_BUILDER = flags.DEFINE_string("builder", "full", "Configuration of the miniature world.")


def main(argv: list[str]) -> None:
    """Prepares the data set; one that is there already is kept."""
    del argv
    logging.set_verbosity(logging.WARNING)
    from miniature.world.tfds_builder import MiniatureWorld

    builder = MiniatureWorld(
        data_dir=_DATA_DIR.value, config=_BUILDER.value, file_format="array_record"
    )
    builder.download_and_prepare()
    for name, split in builder.info.splits.items():
        print(f"{name}: {split.num_examples} scenes in {builder.data_dir}", flush=True)


if __name__ == "__main__":
    app.run(main)
