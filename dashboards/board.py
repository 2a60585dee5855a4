"""What all dashboards have in common: variables, links, and panels of a few kinds on a grid of 24 columns."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from grafana_foundation_sdk.builders import bargauge, common, dashboard, heatmap, prometheus, stat, table, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as common_models
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models import heatmap as heatmap_models
from grafana_foundation_sdk.models import prometheus as prometheus_models

DATASOURCE: Final = models.DataSourceRef(type_val="prometheus", uid="${datasource}")
TAG: Final = "footlight"

NODE: Final = 'instance=~"$instance"'
"""Labels of metrics about a node: the agent itself, GPUs."""
SERVICE: Final = f'service_name=~"$service_name", {NODE}'
MODEL: Final = f'service_name=~"$service_name", model_name=~"$model_name", {NODE}'
RANGE: Final = "$__range"
"""The whole time range."""
RULE: Final = 'service_name=~"$service_name", model_name=~"$model_name"'
"""Labels of what rules record: sums over all nodes."""

GREEN, YELLOW, RED = "green", "yellow", "red"
Step = tuple[float | None, str]
Panel = (
    timeseries.Panel | stat.Panel | heatmap.Panel | table.Panel | bargauge.Panel  # what the functions below make
)
P = TypeVar("P", timeseries.Panel, stat.Panel, heatmap.Panel, table.Panel, bargauge.Panel)


def rate(name: str, labels: str, window: str = "$__rate_interval") -> str:
    """Per-second rate of a counter, over at least four scrapes where no other window is named."""
    return f"rate({name}{{{labels}}}[{window}])"


def quantile(share: float, histogram: str, labels: str, by: str = "", window: str = "$__rate_interval") -> str:
    """A quantile of a classic histogram, by the labels `by` (comma-separated)."""
    grouping = f"{by}, le" if by else "le"
    return f"histogram_quantile({share:g}, sum by ({grouping}) ({rate(f'{histogram}_bucket', labels, window)}))"


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table: its title, the query, the unit."""

    title: str
    expr: str
    unit: str
    steps: Sequence[Step] = ()


@dataclass(slots=True)
class Board:
    """One dashboard in the making. Panels fill lines of 24 columns from left to right, in the order of the calls."""

    uid: str
    title: str
    description: str
    _builder: dashboard.Dashboard = field(init=False)
    _row: str = field(init=False, default="")
    _ids: dict[int, str] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        links = (
            dashboard.DashboardLink("Footlight")
            .type(models.DashboardLinkType.DASHBOARDS)
            .tags([TAG])
            .as_dropdown(False)
            .include_vars(True)
            .keep_time(True)
        )
        self._builder = (
            dashboard.Dashboard(self.title)
            .uid(self.uid)
            .description(self.description)
            .tags([TAG])
            .timezone("browser")
            .time("now-1h", "now")
            .refresh("30s")
            .tooltip(models.DashboardCursorSync.CROSSHAIR)
            .link(links)
            .with_variable(dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus"))
        )
        in_service = 'llm_requests_total{service_name=~"$service_name"}'
        for name, label, query in (
            ("service_name", "Service", "label_values(llm_requests_total, service_name)"),
            ("model_name", "Model", f"label_values({in_service}, model_name)"),
            ("instance", "Agent", "label_values(footlight_build_info, instance)"),
        ):
            self._builder.with_variable(_variable(name, label, query))

    def row(self, title: str, repeat: str = "") -> None:
        """Begin a row; what follows is in it. It is repeated for each value of the variable `repeat`."""
        self._row = title
        row = dashboard.Row(title).id(self._id(f"row {title}"))
        self._builder.with_row(row.repeat(repeat) if repeat else row)

    def stat(
        self, title: str, text: str, expr: str, unit: str, *, empty: str, width: int = 3, steps: Sequence[Step] = ()
    ) -> None:
        """The last value of a query, large, over its course. `empty` is what is said where there is no data."""
        panel = (
            stat.Panel()
            .graph_mode(common_models.BigValueGraphMode.AREA)
            .color_mode(common_models.BigValueColorMode.VALUE)
            .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]).values(False).fields(""))
            .with_target(_query("A", expr, ""))
        )
        self._add(panel, title, text, unit, empty, width, 4, steps)

    def series(
        self,
        title: str,
        text: str,
        targets: Mapping[str, str],
        unit: str,
        *,
        empty: str,
        width: int = 8,
        height: int = 8,
        stacked: bool = False,
        calcs: Sequence[str] = ("mean", "max"),
        steps: Sequence[Step] = (),
        top: float | None = None,
    ) -> None:
        """Lines over time: legend (with `{{label}}`) -> query. `top` is the axis's end, where there is one."""
        legend = (
            common.VizLegendOptions()
            .display_mode(common_models.LegendDisplayMode.TABLE)
            .placement(common_models.LegendPlacement.BOTTOM)
            .show_legend(True)
            .calcs(list(calcs))
        )
        tooltip = (
            common.VizTooltipOptions()
            .mode(common_models.TooltipDisplayMode.MULTI)
            .sort(common_models.SortOrder.DESCENDING)
        )
        panel = timeseries.Panel().legend(legend).tooltip(tooltip).line_width(1).axis_soft_min(0)
        panel.show_points(common_models.VisibilityMode.NEVER).fill_opacity(60 if stacked else 8)
        if stacked:
            panel.stacking(common.StackingConfig().mode(common_models.StackingMode.NORMAL).group("A"))
        if steps:
            mode = common_models.GraphThresholdsStyleMode.DASHED
            panel.thresholds_style(common.GraphThresholdsStyleConfig().mode(mode))
        if top is not None:
            panel.max(top)
        for number, (name, expr) in enumerate(targets.items()):
            panel.with_target(_query(chr(ord("A") + number), expr, name))
        self._add(panel, title, text, unit, empty, width, height, steps)

    def heat(
        self, title: str, text: str, histogram: str, labels: str, *, empty: str, width: int = 12, height: int = 9
    ) -> None:
        """How many observations fell between which bounds of a histogram in seconds, over time."""
        expr = f"sum by (le) (increase({histogram}_bucket{{{labels}}}[$__rate_interval]))"
        target = _query("A", expr, "{{le}}").format(prometheus_models.PromQueryFormat.HEATMAP)
        color = (
            heatmap.HeatmapColorOptions()
            .mode(heatmap_models.HeatmapColorMode.SCHEME)
            .scheme("Turbo")
            .scale(heatmap_models.HeatmapColorScale.EXPONENTIAL)
            .exponent(0.5)
            .steps(64)
        )
        panel = (
            heatmap.Panel()
            .with_target(target)
            .calculate(False)
            .color(color)
            .y_axis(heatmap.YAxisConfig().unit("s").axis_placement(common_models.AxisPlacement.LEFT))
            .cell_gap(1)
            .filter_values(heatmap.FilterValueRange().le(1e-9))
            .show_legend()
            .mode(common_models.TooltipDisplayMode.SINGLE)
            .show_y_histogram()
        )
        self._add(panel, title, text, "s", empty, width, height, ())

    def bars(
        self, title: str, text: str, expr: str, legend: str, unit: str, *, empty: str, width: int = 8, height: int = 8
    ) -> None:
        """The last value of each series as a bar, largest first where the query sorts."""
        panel = (
            bargauge.Panel()
            .orientation(common_models.VizOrientation.HORIZONTAL)
            .display_mode(common_models.BarGaugeDisplayMode.GRADIENT)
            .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]).values(False).fields(""))
            .with_target(_query("A", expr, legend).instant())
        )
        self._add(panel, title, text, unit, empty, width, height, ())

    def table(
        self,
        title: str,
        text: str,
        keys: Mapping[str, str],
        columns: Sequence[Column],
        *,
        empty: str,
        links: Mapping[str, str] | None = None,
        width: int = 24,
        height: int = 8,
    ) -> None:
        """One row for each combination of the labels `keys` (label -> title), one column for each query.

        `links` are title -> path: each row links there.
        """
        panel = table.Panel().show_header(True)
        renamed = dict(keys)
        for number, column in enumerate(columns):
            letter = chr(ord("A") + number)
            query = _query(letter, column.expr, "").instant().format(prometheus_models.PromQueryFormat.TABLE)
            panel.with_target(query)
            renamed[f"Value #{letter}" if len(columns) > 1 else "Value"] = column.title
            properties = [models.DynamicConfigValue("unit", column.unit)]
            if column.steps:
                coloured = {"type": "color-text"}
                properties += [
                    models.DynamicConfigValue("thresholds", _thresholds(column.steps).build()),
                    models.DynamicConfigValue("custom.cellOptions", coloured),
                ]
            panel.override_by_name(column.title, properties)
        if len(columns) > 1:
            panel.with_transformation(models.DataTransformerConfig("merge", options={}))
        order = {name: number for number, name in enumerate(renamed)}
        options = {"excludeByName": {"Time": True}, "indexByName": order, "renameByName": renamed}
        panel.with_transformation(models.DataTransformerConfig("organize", options=options))
        if links:
            first = next(iter(keys.values()))
            urls = [{"title": name, "url": url} for name, url in links.items()]
            for name in dict.fromkeys((first, *keys.values())):
                panel.override_by_name(name, [models.DynamicConfigValue("links", urls)])
        self._add(panel, title, text, "short", empty, width, height, ())

    def link_last(self, links: Mapping[str, str]) -> None:
        """Put links (title -> URL) on the panel that was added last."""
        made = self._builder._internal.panels
        assert made is not None
        panel = made[-1]
        assert isinstance(panel, models.Panel), "a row has no links"
        panel.links = [
            models.DashboardLink(title=name, type_val=models.DashboardLinkType.LINK, url=url)
            for name, url in links.items()
        ]

    def text(self) -> str:
        """The dashboard as Grafana imports it."""
        return json.dumps(self._builder.build(), cls=JSONEncoder, indent=1, sort_keys=True, ensure_ascii=False) + "\n"

    def _add(
        self, panel: P, title: str, text: str, unit: str, empty: str, width: int, height: int, steps: Sequence[Step]
    ) -> None:
        panel.id(self._id(title)).title(title).description(text).datasource(DATASOURCE)
        panel.unit(unit).no_value(empty).span(width).height(height)
        if steps:
            panel.thresholds(_thresholds(steps))
        self._builder.with_panel(panel)

    def _id(self, title: str) -> int:
        """The same for the same title in the same row, whatever stands before it."""
        name = f"{self._row}/{title}"
        number = zlib.crc32(name.encode()) % 1_000_000 + 1
        if number in self._ids:
            raise ValueError(f"{self.uid}: {name!r} and {self._ids[number]!r} have one id; call one of them otherwise")
        self._ids[number] = name
        return number


def _variable(name: str, label: str, query: str) -> dashboard.QueryVariable:
    return (
        dashboard.QueryVariable(name)
        .label(label)
        .datasource(DATASOURCE)
        .query(query)
        .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(models.VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(models.VariableOption(text=["All"], value=["$__all"], selected=True))
    )


def _query(letter: str, expr: str, legend: str) -> prometheus.Dataquery:
    return prometheus.Dataquery().ref_id(letter).datasource(DATASOURCE).expr(expr).legend_format(legend).range()


def _thresholds(steps: Sequence[Step]) -> dashboard.ThresholdsConfig:
    absolute = models.ThresholdsMode.ABSOLUTE
    return dashboard.ThresholdsConfig().mode(absolute).steps([models.Threshold(value, color) for value, color in steps])


def panels(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The panels of a dashboard's JSON that ask something; rows are left out."""
    return [panel for panel in document["panels"] if panel["type"] != "row"]
