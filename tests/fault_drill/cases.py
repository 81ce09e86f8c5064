"""The table of the drill: what is broken, and what has to come of it."""

from __future__ import annotations

import signal

import numpy as np

from tests.fault_drill.case import Case
from tests.fault_drill.commands import (
    EXTRACT,
    EXTRACT_AGAIN,
    FILTER,
    INSPECT,
    LONG,
    LONG_PRETRAIN,
    LONG_SLPD,
    NETWORK,
    PACK,
    PRETRAIN,
    REGIONS,
    REPORT,
    SLPD,
    TILE,
    TILE_AGAIN,
    TRAIN,
    TRAIN_AGAIN,
)
from tests.fault_drill.faults import (
    array,
    at_drawn_tile,
    at_overview,
    at_tile,
    both,
    code,
    copy,
    cut,
    cyclic_links,
    die,
    external_link,
    external_storage,
    features,
    group,
    hang,
    hdf5,
    limit_files,
    limit_memory,
    link,
    mount,
    other_weights,
    picture,
    references,
    remove,
    replace_text,
    write,
)

SLIDE, COORDS = "slides/S1.tiff", "tiles/coords/S1.h5"
BAG, STORED = "features/mean_colour/h5_files/S1.h5", "cohort/bags/h5_files/s02.h5"
OTHER_TILES = ("new/coords/S0.h5", "new/coords/S2.h5", "new/failures.csv")
OTHER_BAGS = tuple(
    f"new/mean_colour/{name}" for name in ("h5_files/S0.h5", "h5_files/S2.h5", "failures.csv")
)
DONE = tuple(f"features/mean_colour/h5_files/{name}.h5" for name in ("S0", "S2"))
MINUTE = "read_timeout=1"
MiB = 1 << 20
FULL, READ_ONLY = "No space left|disk is full", "Read-only file system"

SLIDES = (
    Case("slides: empty", TILE, 1, "S1,tile_slides", write(SLIDE, ""), kept=OTHER_TILES),
    Case("slides: cut off", TILE, 1, "S1,tile_slides", cut(SLIDE), kept=OTHER_TILES),
    Case("slides: text", TILE, 1, "S1,", write(SLIDE, "a slide\n"), kept=OTHER_TILES),
    Case("slides: broken picture in a tile folder", TILE, 1, "T9,",
         write("slides/T9/0_0.png", "broken"), kept=OTHER_TILES),
    Case("slides: a dangling link beside them", TILE, 0, "3 slides",
         link("slides/S9.tiff", "nowhere.tiff"), kept=OTHER_TILES[:2]),
    Case("slides: a link that leads back up", TILE, 0, "3 slides",
         link("slides/up", "."), kept=OTHER_TILES[:2]),
    Case("slides: none", TILE, 2, "expected slides", both(remove("slides"), write("slides/x", ""))),
    Case("slides: two of one name", TILE, 1, "S1,tile_slides.*rename", copy(SLIDE, "slides/more/S1.tiff")),
    Case("slides: a name that is not UTF-8", TILE, 1, r"S\\udcff,", copy(SLIDE, b"slides/S\xff.tiff"),
         kept=OTHER_TILES),
    Case("slides: a name of 230 bytes", TILE, 0, "4 slides", copy(SLIDE, f"slides/{'L' * 230}.tiff"),
         kept=(f"new/coords/{'L' * 230}.h5", *OTHER_TILES[:2])),
    Case("slides: inspected, one is cut off", INSPECT, 1, "S1", cut(SLIDE)),
    Case("slides: emptied after tiling", EXTRACT, 1, "S1,extract", write(SLIDE, ""), kept=OTHER_BAGS),
    Case("slides: cut off after tiling", EXTRACT, 1, "S1,extract", cut(SLIDE), kept=OTHER_BAGS),
    Case("slides: one without tiles", EXTRACT, 1, "S9,", copy(SLIDE, "slides/S9.tiff"),
         kept=OTHER_BAGS),
)  # fmt: skip

COORDINATES = (
    Case("coordinates: empty", EXTRACT, 1, "S1.h5.*tile the slide again", write(COORDS, ""),
         kept=OTHER_BAGS),
    Case("coordinates: cut off", EXTRACT, 1, "S1.h5.*tile the slide again", cut(COORDS),
         kept=OTHER_BAGS),
    Case("coordinates: groups", EXTRACT, 1, "S1.h5.*group", hdf5(COORDS, group), kept=OTHER_BAGS),
    Case("coordinates: cyclic links", EXTRACT, 1, "S1.h5.*link", hdf5(COORDS, cyclic_links),
         kept=OTHER_BAGS),
    Case("coordinates: without tile size", EXTRACT, 1, "S1.h5.*patch_size",
         array(COORDS, coords=np.zeros((3, 2))), kept=OTHER_BAGS),
    Case("coordinates: cut off, tiled again", TILE_AGAIN, 0, "2 already tiled", cut(COORDS),
         kept=("tiles/coords/S0.h5", "tiles/coords/S2.h5")),
    Case("coordinates: cut off, in a report", REPORT, 0, "", cut(COORDS)),
    Case("coordinates: not measured, filtered", FILTER, 1, "S1,.*quality=true"),
)  # fmt: skip

BAGS = (
    *(
        Case(f"bags: {name}, extracted again", EXTRACT_AGAIN, 0, "S1.h5.*made anew", damage,
             kept=(*DONE, BAG) if name == "cut off" else DONE)
        for name, damage in (
            ("empty", write(BAG, "")), ("groups", hdf5(BAG, group)),
            ("cyclic links", hdf5(BAG, cyclic_links)), ("an external link", hdf5(BAG, external_link)),
        )
    ),
    Case("bags: cut off, extracted again", EXTRACT_AGAIN, 0, "S1.h5.*made anew", cut(BAG), kept=DONE),
    Case("bags: of other settings", f"{EXTRACT_AGAIN} dtype=float16", 2, "'float32' -> 'float16'",
         kept=(*DONE, BAG)),
    *(
        Case(f"bags: {name}, trained on", TRAIN, 2, f"s02.h5.*{line}", damage)
        for name, line, damage in (
            ("empty", "cannot be read", write(STORED, "")),
            ("cut off", "cannot be read", cut(STORED)),
            ("text", "cannot be read", write(STORED, "features")),
            ("NaN", "NaN", features(STORED, lambda rows: rows * np.nan)),
            ("no tiles", "empty bag", features(STORED, lambda rows: rows[:0])),
            ("another width", "expected 4 features", features(STORED, lambda rows: rows[:, :3])),
            ("strings", "type object", features(STORED, lambda rows: [["a", "b"]] * len(rows))),
            ("references", "type object", hdf5(STORED, references)),
            ("groups", "group", hdf5(STORED, group)),
            ("cyclic links", "link", hdf5(STORED, cyclic_links)),
            ("an external link", "link", hdf5(STORED, external_link)),
            ("bytes of another file", "other files", hdf5(STORED, external_storage)),
        )
    ),
    Case("bags: cut off, left out", f"{TRAIN} skip_bad=true", 0, "s02.h5.*left out", cut(STORED),
         kept=("new/results.json",)),
    Case("bags: one is missing", TRAIN, 2, "s02; extract", remove(STORED)),
    Case("bags: cut off, packed", PACK, 1, "S1,pack.*cannot be read", cut(BAG), kept=("new/set.h5",)),
    Case("bags: cut off, regions", REGIONS, 1, "S1,build_regions.*cannot be read", cut(BAG),
         kept=("new/mean_colour/S0.h5", "new/mean_colour/S2.h5", "new/failures.csv")),
    Case("bags: cut off, in a report", REPORT, 0, "", cut(BAG)),
)  # fmt: skip

CHECKPOINTS = (
    Case("checkpoints: cut off", TRAIN_AGAIN, 2, "checkpoint_last.pt.*cannot be read",
         both(remove("run/results.json"), cut("run/checkpoint_last.pt"))),
    Case("checkpoints: code", TRAIN_AGAIN, 2, "checkpoint_last.pt.*cannot be read",
         both(remove("run/results.json"), code("run/checkpoint_last.pt"))),
    Case("checkpoints: another architecture", TRAIN_AGAIN, 2, "another architecture",
         both(remove("run/results.json"), other_weights("run/checkpoint_last.pt"))),
    Case("checkpoints: of unknown origin", TRAIN_AGAIN, 2, "unknown origin", remove("run/run.json"),
         kept=("run/checkpoint_last.pt",)),
    Case("checkpoints: a broken record", TRAIN_AGAIN, 2, "run.json.*JSON", cut("run/run.json")),
    Case("checkpoints: another run", f"{TRAIN_AGAIN} training.lr=0.5", 2, "-> 0.5",
         kept=("run/checkpoint_last.pt", "run/results.json")),
    Case("checkpoints: weights that are cut off", f"{NETWORK} weights=w.pt", 2, "w.pt",
         write("w.pt", "PK cut off")),
    Case("checkpoints: weights that are code", f"{NETWORK} weights=w.pt", 2, "w.pt", code("w.pt")),
)  # fmt: skip

LABELS = "cohort/labels.csv"
TABLES = (
    Case("tables: empty", TRAIN, 2, "labels.csv", write(LABELS, "")),
    Case("tables: only a header", TRAIN, 2, "labels.csv", write(LABELS, "case_id,slide_id,label\n")),
    Case("tables: a column is missing", TRAIN, 2, "'slide_id' is missing",
         replace_text(LABELS, "slide_id", "slide")),
    Case("tables: a slide twice", TRAIN, 2, "more than once", replace_text(LABELS, "s03", "s02")),
    Case("tables: an unknown slide", TRAIN, 2, "no bag: x02", replace_text(LABELS, "s02", "x02")),
    Case("tables: not UTF-8", TRAIN, 2, "labels.csv", write(LABELS, b"case_id,slide_id,label\n\xff,a,b")),
    Case("tables: too many cells", TRAIN, 2, "line 2", replace_text(LABELS, "neg,", "neg,1,2,3,")),
    Case("tables: an id that is a path", TRAIN, 2, "plain file name",
         replace_text(LABELS, "s02", "../s02")),
    Case("tables: one class", TRAIN, 2, "two classes", replace_text(LABELS, "pos", "neg")),
)  # fmt: skip

SETTINGS = (
    Case("settings: an unknown key", f"{TILE} tile_sze=1", 2, "did you mean 'tile_size'"),
    Case("settings: another type", f"{TILE} tile_size=big", 2, "expected int"),
    Case("settings: NaN", f"{TILE} min_tissue=nan", 2, "found nan"),
    Case("settings: NaN in a block", f"{TRAIN} training.lr=.nan", 2, "found nan"),
    Case("settings: a variable", TILE.replace("=new", "=${HOME}/new"), 2, "variable"),
    Case("settings: a path that is not there", TILE.replace("=slides", "=slide"), 2, "'slides'"),
    Case("settings: a key twice", f"{TILE} --config c.yaml", 2, "'pad' twice",
         write("c.yaml", "pad: true\npad: false\n")),
    Case("settings: two files", f"{TILE} --config c.yaml --config d.yaml", 2, "one file",
         both(write("c.yaml", "pad: true\n"), write("d.yaml", "pad: true\n"))),
    Case("settings: a file that is no YAML", f"{TILE} --config c.yaml", 2, "c.yaml.*YAML",
         write("c.yaml", b"\xff\xfe\x00: [")),
    Case("settings: no file", f"{TILE} --config c.yaml", 2, "c.yaml.*found none"),
    Case("settings: fewer than no workers", f"{EXTRACT} workers=-1", 2, "workers=-1"),
    Case("settings: an unknown encoder", EXTRACT.replace("mean_colour", "resnet81"), 2, "resnet81"),
)  # fmt: skip

AT_WORK = at_tile("S1", 6, hang)
UNDER_WAY = "new/mean_colour/h5_files/S0.h5"
SIGNALS = (
    *(
        Case(f"signals: {name} in extraction", EXTRACT, status, line, inside=AT_WORK, number=number,
             when="new/mean_colour/h5_files/.S1.h5.*", kept=(UNDER_WAY,), again=True)
        for name, number, status, line in (
            ("SIGTERM", signal.SIGTERM, 143, "told to end"),
            ("SIGINT", signal.SIGINT, 130, "interrupted"),
            ("SIGKILL", signal.SIGKILL, -9, ""),
        )
    ),
    *(
        Case(f"signals: {name} in tiling", TILE, status, line, inside=at_overview("S1", hang),
             number=number, when="new/coords/S0.h5", again=True)
        for name, number, status, line in (
            ("SIGTERM", signal.SIGTERM, 143, "told to end"),
            ("SIGKILL", signal.SIGKILL, -9, ""),
        )
    ),
    *(
        Case(f"signals: {name} in a training", LONG, status, line, number=number,
             when="new/checkpoint_last.pt", again=True)
        for name, number, status, line in (
            ("SIGTERM", signal.SIGTERM, 143, "told to end"),
            ("SIGKILL", signal.SIGKILL, -9, ""),
        )
    ),
    Case("signals: SIGTERM with workers", EXTRACT.replace("workers=0", "workers=2"), 143, "told to end",
         inside=AT_WORK, number=signal.SIGTERM, when=UNDER_WAY, kept=(UNDER_WAY,), again=True),
    Case("signals: a worker is killed", EXTRACT.replace("workers=0", "workers=1"), 1,
         "S1,.*SIGKILL", inside=at_tile("S1", 0, die(signal.SIGKILL)), kept=OTHER_BAGS),
    Case("signals: a worker crashes", EXTRACT.replace("workers=0", "workers=1"), 1,
         "S1,.*SIGABRT", inside=at_tile("S1", 0, die(signal.SIGABRT)), kept=OTHER_BAGS),
    Case("signals: a worker of the tiling is killed", TILE.replace("workers=0", "workers=1"), 1,
         "S1,.*SIGKILL", inside=at_overview("S1", die(signal.SIGKILL)), kept=OTHER_TILES),
)  # fmt: skip

HANGS = (
    Case("hangs: a slide in extraction", EXTRACT.replace("workers=0", f"workers=1 {MINUTE}"), 1,
         "S1,.*did not answer", inside=at_tile("S1", 0, hang), kept=OTHER_BAGS),
    Case("hangs: a slide in tiling", TILE.replace("workers=0", f"workers=1 {MINUTE}"), 1,
         "S1,.*did not answer", inside=at_overview("S1", hang), kept=OTHER_TILES),
)  # fmt: skip

WEIGHTS = ("new/backbone.pt",)
PRETRAINING = (
    Case("pretraining: a slide that is cut off after tiling", PRETRAIN, 1, "S1,pretrain",
         cut(SLIDE), kept=WEIGHTS),
    Case("pretraining: a slide without coordinates", PRETRAIN, 1, "S1,pretrain", remove(COORDS),
         kept=WEIGHTS),
    Case("pretraining: no coordinates", PRETRAIN, 2, "expected coordinates",
         remove("tiles/coords")),
    Case("pretraining: a loss that is no number", f"{PRETRAIN} training.lr=1e30 training.warmup=0",
         2, "expected a finite loss"),
    Case("pretraining: a full disk", PRETRAIN, 2, FULL, inside=mount("new", "size=64k")),
    Case("pretraining: a read-only disk", PRETRAIN, 2, READ_ONLY, inside=mount("new", "ro")),
    Case("pretraining: a slide hangs", PRETRAIN.replace("workers=0", f"workers=1 {MINUTE}"), 1,
         "S1,pretrain.*did not answer", inside=at_drawn_tile("S1", hang), kept=WEIGHTS),
    Case("pretraining: a worker is killed", PRETRAIN.replace("workers=0", "workers=1"), 1,
         "S1,pretrain.*SIGKILL", inside=at_drawn_tile("S1", die(signal.SIGKILL)), kept=WEIGHTS),
    Case("pretraining: SIGTERM", LONG_PRETRAIN, 143, "told to end", number=signal.SIGTERM,
         when="new/checkpoint_last.pt", again=True),
    Case("pretraining: SIGKILL", LONG_PRETRAIN, -9, "", number=signal.SIGKILL,
         when="new/checkpoint_last.pt", again=True),
)  # fmt: skip

REGION_FILE = "regions/mean_colour/S1.h5"
REGION_TRAINING = (
    Case("regions: a file that is cut off", SLPD, 2, "S1.h5: expected a region file",
         cut(REGION_FILE)),
    Case("regions: no files", SLPD, 2, "expected a path that exists|regions", remove("regions")),
    Case("regions: a bag that is gone", SLPD, 2, "expected the bag .*S1.h5, found none", remove(BAG)),
    Case("regions: a bag of other tiles", SLPD, 2, "S1.h5: expected the bag",
         copy("features/mean_colour/h5_files/S0.h5", BAG)),
    Case("regions: too few in every slide", f"{SLPD} prototypes.min_regions=50", 2,
         "expected slides of two patients with so many regions, found 0"),
    Case("regions: no Redis server", f"{SLPD} store=redis redis_url=unix:///nowhere.sock", 2,
         "expected a Redis server|nowhere.sock"),
    Case("regions: a loss that is no number", f"{SLPD} training.lr=1e30 training.warmup=0", 2,
         "expected a finite loss"),
    Case("regions: a full disk", SLPD, 2, FULL, inside=mount("new", "size=64k")),
    Case("regions: SIGTERM in training", LONG_SLPD, 143, "told to end", number=signal.SIGTERM,
         when="new/checkpoint_last.pt", again=True),
    Case("regions: SIGKILL in training", LONG_SLPD, -9, "", number=signal.SIGKILL,
         when="new/checkpoint_last.pt", again=True),
)  # fmt: skip

DISKS = (
    Case("full disk: tiling", TILE, 2, FULL, inside=mount("new", "size=64k")),
    Case("full disk: tiling with workers", TILE.replace("workers=0", "workers=2"), 2, FULL,
         inside=mount("new", "size=64k")),
    Case("full disk: extraction", EXTRACT, 2, "free", inside=mount("new", "size=100k")),
    Case("full disk: training", TRAIN, 2, FULL, inside=mount("new", "size=4k")),
    Case("full disk: packing", PACK, 2, FULL, inside=mount("new", "size=4k")),
    Case("full disk: regions", REGIONS, 2, FULL, inside=mount("new", "size=4k")),
    Case("file size limit: tiling", TILE, 2, "File too large", inside=limit_files(4096)),
    Case("file size limit: extraction", EXTRACT, 2, "disk is full", inside=limit_files(4096)),
    Case("file size limit: training", TRAIN, 2, "File too large", inside=limit_files(2048)),
    Case("read-only: tiling", TILE, 2, READ_ONLY, inside=mount("new", "ro")),
    Case("read-only: extraction", EXTRACT, 2, READ_ONLY, inside=mount("new", "ro")),
    Case("read-only: training", TRAIN, 2, READ_ONLY, inside=mount("new", "ro")),
    Case("read-only: packing", PACK, 2, READ_ONLY, inside=mount("new", "ro")),
    Case("read-only: regions", REGIONS, 2, READ_ONLY, inside=mount("new", "ro")),
    Case("read-only: a report", REPORT, 2, READ_ONLY, inside=mount("new", "ro")),
    Case("read-only: nothing left to extract", EXTRACT_AGAIN, 0, "3 already done",
         inside=mount("features", "ro"), kept=(*DONE, BAG)),
    Case("read-only: slides", TILE, 0, "3 slides", inside=mount("slides", "ro"),
         kept=OTHER_TILES[:2]),
)  # fmt: skip

MEMORY = (
    Case("memory: tiling", f"{TILE} pictures=true mpp=1", 1, "S9,.*expected memory",
         picture("slides/S9.png", 6000), inside=limit_memory(32 * MiB)),
    Case("memory: extraction with a network", f"{NETWORK} batch_size=64", 2, "memory",
         inside=limit_memory(8 * MiB)),
    Case("memory: training", TRAIN, 2, "expected memory",
         array(STORED, features=np.zeros((4 * MiB, 4), np.float32)),
         inside=limit_memory(8 * MiB)),
)  # fmt: skip

CASES = (
    *SLIDES, *COORDINATES, *BAGS, *CHECKPOINTS, *TABLES, *SETTINGS, *SIGNALS, *HANGS, *DISKS, *MEMORY,
    *PRETRAINING, *REGION_TRAINING,
)  # fmt: skip
