"""NIH's and VinDr's labels beside torchxrayvision's, which maps the same tables."""

from pathlib import Path

import numpy as np
import pytest

from pipeline.sources import nih, vindr
from tests.conftest import shipped_table

xrv = pytest.importorskip("torchxrayvision")
pytestmark = pytest.mark.soak  # each reads a whole table twice

SAME = {
    "Effusion": "Pleural Effusion",
    **{name: name for name in ("Atelectasis", "Cardiomegaly", "Consolidation", "Pneumothorax")},
}


def test_nih_s_shared_labels_are_the_same(tmp_path: Path) -> None:
    theirs = xrv.datasets.NIH_Dataset(imgpath=str(tmp_path), views=["PA", "AP"])
    ours = nih.SET.read_table(shipped_table("Data_Entry_2017_v2020.csv.gz")).to_pandas()
    order = ours.set_index("path").loc[theirs.csv["Image Index"]]
    for name, label in (SAME | {"Edema": "Edema", "Pneumonia": "Pneumonia"}).items():
        column = theirs.labels[:, theirs.pathologies.index(name)]
        np.testing.assert_array_equal(order[label].to_numpy(), column)


def test_vindr_s_positives_and_uncertain_are_what_any_reader_saw(tmp_path: Path) -> None:
    table = shipped_table("vinbigdata-train.csv.gz")
    theirs = xrv.datasets.VinDr_Dataset(imgpath=str(tmp_path))
    ours = vindr.SET.read_table(table).to_pandas()
    order = ours.set_index("patient").loc[theirs.csv["image_id"]]
    for name, label in SAME.items():
        column = theirs.labels[:, list(theirs.pathologies).index(name)]
        np.testing.assert_array_equal(order[label].abs().to_numpy(), column)
