"""Series that ship with the package; sources and terms are in `LICENCES.md` beside the files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class DataSet:
    """A file of this folder: what it holds, in which unit, from whom, on what terms."""

    name: str
    file: str
    column: str
    unit: str
    step: str
    title: str
    source: str
    licence: str

    @property
    def path(self) -> Path:
        """Where the file lies in the installed package."""
        return Path(__file__).with_name(self.file)


DATA_SETS: dict[str, DataSet] = {
    item.name: item
    for item in (
        DataSet(
            "co2",
            "co2.csv",
            "co2",
            "ppm",
            "week",
            "Weekly atmospheric CO2 at Mauna Loa, 1958 to 2001",
            "C. D. Keeling and T. P. Whorf, CDIAC, Oak Ridge National Laboratory, 2004",
            "public domain",
        ),
        DataSet(
            "sunspots",
            "sunspots.csv",
            "SUNACTIVITY",
            "sunspots",
            "year",
            "Yearly sunspot activity, 1700 to 2008",
            "National Geophysical Data Center, NOAA",
            "public domain",
        ),
        DataSet(
            "seattle-temps",
            "seattle-temps.csv",
            "temp",
            "°F",
            "hour",
            "Hourly temperature in Seattle, 2010",
            "NOAA, in the form of vega_datasets",
            "public domain",
        ),
    )
}
