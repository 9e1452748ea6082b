"""Traces are read as they are written, and a bad one is refused with its line."""

import pytest

from fl.errors import ConfigError
from fl.trace import Device, read_trace

HEADER = "client,seconds_per_step,latency_s,up_mbps,down_mbps"
WINDOWS = HEADER + ",from_s,until_s"


def read(tmp_path, *rows, header=HEADER):
    path = tmp_path / "trace.csv"
    path.write_text("\n".join([header, *rows]) + "\n")
    return read_trace(str(path), "network.path")


def test_devices_and_windows(tmp_path):
    rows = ["0,0.12,0.04,5,40,3600,7200", "0,,,,,0,10.5", "0,0.12,0.04,5,40,7200,7201", "1,0.03,0.01,,,,"]
    devices = read(tmp_path, *rows, header=WINDOWS)
    windows = ((0, 10_500_000), (3_600_000_000, 7_200_000_000), (7_200_000_000, 7_201_000_000))
    assert devices == {0: Device(0.12, 0.04, 40.0, 5.0, windows), 1: Device(0.03, 0.01, None, None)}


def test_spaces_blank_lines_and_a_byte_order_mark_do_no_harm(tmp_path):
    assert read(tmp_path, "", " 3 , 1 , 0 , , 2 ", "", header="\ufeff" + HEADER) == {3: Device(1.0, 0.0, 2.0, None)}


@pytest.mark.parametrize(
    ("header", "rows", "complaint"),
    [
        (HEADER, [], "line 1: there is no row"),
        ("", [], "line 1: expected the columns"),
        ("client,latency_s", ["0,1"], "line 1: expected the columns"),
        (HEADER + ",colour", ["0,1,0,1,1,red"], "line 1: expected the columns"),
        (HEADER + ",from_s", ["0,1,0,1,1,5"], "line 1: expected the columns"),
        (HEADER + ",client", ["0,1,0,1,1,0"], "line 1: expected the columns"),
        (HEADER, ["0,1,0,1,1", "1,1,0,1"], "line 3: the row has more or fewer values"),
        (HEADER, ["0,1,0,1,1,7"], "line 2: the row has more or fewer values"),
        (HEADER, ["-1,1,0,1,1"], "line 2: client must be a whole number"),
        (HEADER, ["x,1,0,1,1"], "line 2: client must be a whole number"),
        (HEADER, ["0,1,0,1,1", "", "1,fast,0,1,1"], "line 4: seconds_per_step must be a number >= 0, not 'fast'"),
        (HEADER, ["0,,0,1,1"], "line 2: seconds_per_step"),
        (HEADER, ["0,1,-0.1,1,1"], "line 2: latency_s must be a number >= 0"),
        (HEADER, ["0,1,nan,1,1"], "line 2: latency_s"),
        (HEADER, ["0,1,0,0,1"], "line 2: up_mbps must be a number > 0"),
        (HEADER, ["0,1,0,1,inf"], "line 2: down_mbps must be a number > 0"),
        (HEADER, ["0,1,0,1,1", "0,1,0,1,1"], "line 3: the client is listed twice"),
        (WINDOWS, ["0,1,0,1,1,,", "0,1,0,1,1,5,6"], "line 3: the client is listed twice"),
        (WINDOWS, ["0,1,0,1,1,5,6", "0,1,0,1,1,,"], "line 3: the client is listed twice"),
        (WINDOWS, ["0,1,0,1,1,5,"], "line 2: a window needs both"),
        (WINDOWS, ["0,1,0,1,1,5,5"], "line 2: from_s=5 must be below until_s=5"),
        (WINDOWS, ["0,1,0,1,1,5,x"], "line 2: until_s must be a number"),
        (WINDOWS, ["0,1,0,1,1,5,9", "0,2,0,1,1,10,11"], "line 3: the client has another device"),
        (WINDOWS, ["0,1,0,1,1,5,9", "0,,,,,1,5.1"], "line 3: the window overlaps"),
    ],
)
def test_a_bad_trace_is_refused_with_its_line(tmp_path, header, rows, complaint):
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, *rows, header=header)
    assert str(caught.value).startswith("network.path=")
    assert complaint in str(caught.value)


def test_a_trace_that_is_no_file(tmp_path):
    binary = tmp_path / "binary.csv"
    binary.write_bytes(b"\xff\xfe\x00client")
    for path in (str(tmp_path / "none.csv"), str(tmp_path), str(binary)):
        with pytest.raises(ConfigError, match=r"network.path=.* can be read"):
            read_trace(path, "network.path")
