"""How many points are enough: `python -m benchmarks.points`.

Barrier and lengths of the matched line and of the geodesic, optimised as a preset does (but for
the steps), for several N between the same ends. Few points may miss a bump, so the loss is also
taken in the middles between them.
"""

from typing import Any

import tyro

from benchmarks.convergence import Bench
from benchmarks.ends import Options
from benchmarks.harness import environment, write_result
from fastgeo import keep_pages
from fastgeo.profiling.measure import headline, table

POINTS = (5, 9, 17, 25)


def by_points(bench: Bench) -> list[dict[str, Any]]:
    """Two rows for each N, the matched line and the geodesic."""
    rows = []
    for n in POINTS:
        rows.append({"N": n, "path": "matched line", "seconds": 0.0, **bench.before(n)})
        rows.append({"N": n, "path": "geodesic", **bench.row(n, bench.config.descent)})
    return [{key: value for key, value in row.items() if key != "course"} for row in rows]


def main() -> None:
    options = tyro.cli(Options, prog="python -m benchmarks.points", description=__doc__)
    keep_pages()
    print(headline(environment()), flush=True)
    bench = Bench(options)
    rows = by_points(bench)
    print(table(rows))
    if options.save:
        name = f"points-{options.preset}"
        print(f"\nwrote {write_result(name, {'setting': bench.setting, 'rows': rows})}")


if __name__ == "__main__":
    main()
