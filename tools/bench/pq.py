"""Is product quantization really smaller and really faster? Layers and whole networks against int8 engines.

    python -m fxpress.tools.bench.pq [--quick] [--only GLOB ...] [--work DIR] [--json FILE]

Layers: FC 9216×4096, 4096×4096, 4096×1000 and a 3×3 convolution 256→384 on 13×13, batch 1 and 8, one and two threads,
warm and cold cache, against torch, ONNX Runtime and OpenVINO in fp32 and int8. All engines of a case are timed in turns
in one process (`timing`), and the better int8 engine of each case is what fxpress is compared with.

Networks: torchvision's AlexNet and VGG-16 with every layer quantised, in the published settings and in faster ones
(`pq_networks`): bytes of the file, time of an image, peak memory of a fresh process that loads the file and runs one
image, and where the time goes.

Weights, codewords and indices are random, which changes neither time nor size; with one exception, the size behind
entropy coding, which is that of k-means codes of random weights. With `--json` the file's rows of other cases are kept,
so that a run can be made in parts by `--only`; `--work` keeps the files of all engines from part to part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from .common import Row, header, screen
from .loads import LOADS
from .parts import Job, choose, parsed, parser, run_jobs, settings, work_folder
from .pq_cases import cases
from .pq_layers import measure_layer
from .pq_networks import NETWORKS, measure_memory, measure_network, measure_nodes, measure_size, sized
from .timed_rows import print_tables


def main() -> None:
    """Run the parts asked for; print the tables; write the rows after each part."""
    quick = "two layers and AlexNet, batch 1, one thread, few rounds"
    options = parsed(parser(__doc__, quick, "'FC 9216', 'alexnet, file'"))
    with work_folder(options.work) as folder:
        chosen = choose(jobs(folder, options.rounds, options.seed, quick=options.quick), options.only)
        rows = [header(options.seed), Row("header", "settings", settings(options.rounds))]
        show_tables(run_jobs(chosen, rows, options.json))


def jobs(folder: Path, rounds: int, seed: int, *, quick: bool) -> Iterator[Job]:
    """All parts in order; `quick`: a small FC, the convolution and AlexNet, batch 1, one thread.

    Args:
        folder: keeps exported and quantised files from part to part.
        rounds: of a warm measurement.
        seed: of weights, codes and images.
        quick: whether the short form is wanted.
    """
    turns = rounds + -(-rounds // 2)
    loads = LOADS[:1] if quick else LOADS
    for case in cases(quick=quick):
        for load in loads:
            yield Job(f"{case.name}, {load}", partial(measure_layer, case, load, folder, rounds), turns)
    for network in NETWORKS[:1] if quick else NETWORKS:
        files = sum(len(recipe.storages) for recipe in sized())
        yield Job(f"{network.name}, file", partial(measure_size, network, folder, seed), files)
        for load in loads:
            if load.batch == 1:
                run = partial(measure_network, network, load, folder, seed, rounds)
                yield Job(f"{network.name}, {load}", run, turns)
        yield Job(f"{network.name}, memory", partial(measure_memory, network, folder, seed), 8)
        if not quick:
            yield Job(f"{network.name}, nodes", partial(measure_nodes, network, folder, seed, rounds), 4 * (rounds + 2))


def show_tables(rows: Sequence[Row]) -> None:
    """Times, memory and bytes, each as a table where there are any."""
    print_tables(rows, "Times; ratios: times faster", "Files, and what emit chose", screen())


if __name__ == "__main__":
    main()
