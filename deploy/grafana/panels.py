"""What the dashboards are made of: panels, expressions, variables and marks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from grafana_foundation_sdk.builders import common, dashboard, heatmap, prometheus, stat, table, timeseries
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.models import common as common_models
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

TAG: Final = "ferryman"
_DATASOURCE: Final = models.DataSourceRef(type_val="prometheus", uid="${datasource}")
_HEIGHT: Final = 8
_STAT_HEIGHT: Final = 4
FULL_WIDTH: Final = 24
_QUANTILES: Final = (0.5, 0.95, 0.99)


@dataclass(frozen=True, kw_only=True)
class Query:
    """An expression, and the name of its curves: a legend with {{label}} in it."""

    expression: str
    legend: str


@dataclass(frozen=True, kw_only=True)
class Marks(Builder[models.AnnotationQuery]):
    """Vertical lines over every curve of a dashboard, where the expression has a value.

    With `at_value`, the line stands not at the time of the sample but at its value, milliseconds since 1970.
    """

    name: str
    expression: str
    title: str
    color: str
    at_value: bool = False

    def build(self) -> models.AnnotationQuery:
        """Return them as Grafana wants them."""
        return _PrometheusAnnotation(self)


class _PrometheusAnnotation(models.AnnotationQuery):
    """With the fields that only Prometheus' annotations have."""

    def __init__(self, marks: Marks) -> None:
        super().__init__(
            name=marks.name, datasource=_DATASOURCE, enable=True, icon_color=marks.color, expr=marks.expression
        )
        self._marks = marks

    def to_json(self) -> dict[str, object]:
        own: dict[str, object] = {"titleFormat": self._marks.title, "step": "60s"}
        if self._marks.at_value:
            own["useValueForTime"] = "on"
        return {**super().to_json(), **own}


def graph(
    title: str,
    *queries: Query,
    unit: str,
    text: str = "",
    width: int = 8,
    stacked: bool = False,
    logarithmic: bool = False,
    lowest: float | None = 0,
) -> timeseries.Panel:
    """Return curves over time."""
    panel = timeseries.Panel().title(title).description(text).unit(unit).span(width).height(_HEIGHT)
    panel.datasource(_DATASOURCE).fill_opacity(25 if stacked else 5).line_width(1)
    panel.show_points(common_models.VisibilityMode.NEVER)
    panel.legend(_legend()).tooltip(common.VizTooltipOptions().mode(common_models.TooltipDisplayMode.MULTI))
    if stacked:
        panel.stacking(common.StackingConfig().mode(common_models.StackingMode.NORMAL))
    if logarithmic:
        scale = common.ScaleDistributionConfig().type(common_models.ScaleDistribution.LOG).log(10)
        panel.scale_distribution(scale)
    elif lowest is not None:
        panel.min(lowest)
    for target in _targets(queries):
        panel.with_target(target)
    return panel


def newest(
    title: str, query: Query, *, unit: str, text: str = "", width: int = 4, decimals: int | None = None
) -> stat.Panel:
    """Return the newest values, large."""
    panel = stat.Panel().title(title).description(text).unit(unit).span(width).height(_STAT_HEIGHT)
    panel.datasource(_DATASOURCE).graph_mode(common_models.BigValueGraphMode.NONE)
    panel.color_mode(common_models.BigValueColorMode.NONE).text_mode(common_models.BigValueTextMode.AUTO)
    panel.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    if decimals is not None:
        panel.decimals(decimals)
    for target in _targets((query,)):
        panel.with_target(target)
    return panel


def heat_map(title: str, expression: str, *, unit: str, text: str = "", width: int = 8) -> heatmap.Panel:
    """Return a heat map of a histogram's buckets; the expression gives their rates by `le`."""
    panel = heatmap.Panel().title(title).description(text).span(width).height(_HEIGHT).datasource(_DATASOURCE)
    panel.color(heatmap.HeatmapColorOptions().mode(HeatmapColorMode.SCHEME).scheme("Oranges").exponent(0.5).steps(64))
    panel.y_axis(heatmap.YAxisConfig().unit(unit)).calculate(False).show_tooltip()
    query = prometheus.Dataquery().expr(expression).legend_format("{{le}}").format(PromQueryFormat.HEATMAP)
    return panel.with_target(query.range().ref_id("A").datasource(_DATASOURCE))


def listing(title: str, query: Query, *, text: str = "", width: int = 12) -> table.Panel:
    """Return a table of the newest values' labels."""
    panel = table.Panel().title(title).description(text).span(width).height(_HEIGHT).datasource(_DATASOURCE)
    target = prometheus.Dataquery().expr(query.expression).instant().format(PromQueryFormat.TABLE).ref_id("A")
    panel.with_target(target.legend_format(query.legend).datasource(_DATASOURCE))
    excluded = dict.fromkeys(("Time", "__name__", "Value", "job"), True)
    organize = models.DataTransformerConfig(id_val="organize", options={"excludeByName": excluded})
    return panel.with_transformation(organize)


def quantiles(buckets: str, *, by: Iterable[str] = (), legend: str = "") -> list[Query]:
    """Return p50, p95 and p99 of a histogram's buckets, a selector such as `x_bucket{…}`."""
    labels = ", ".join((*by, "le"))
    rate = f"sum by ({labels}) (rate({buckets}[$__rate_interval]))"
    return [
        Query(expression=f"histogram_quantile({quantile}, {rate})", legend=f"{legend} p{quantile * 100:g}".strip())
        for quantile in _QUANTILES
    ]


def summed_rate(selector: str, *, by: str = "") -> str:
    """Return the events per second of counters, added up."""
    grouping = f" by ({by})" if by else ""
    return f"sum{grouping} (rate({selector}[$__rate_interval]))"


def mean(histogram: str, selector: str, *, by: str = "") -> str:
    """Return the mean of what a histogram observed."""
    total, count = (summed_rate(f"{histogram}_{part}{{{selector}}}", by=by) for part in ("sum", "count"))
    return f"{total} / {count}"


def new_dashboard(title: str, uid: str, text: str) -> dashboard.Dashboard:
    """Return an empty dashboard that lets its reader choose the data source, and links to its siblings."""
    board = dashboard.Dashboard(title).uid(uid).description(text).tags([TAG]).timezone("browser").readonly()
    board.time("now-1h", "now").refresh("30s").tooltip(models.DashboardCursorSync.CROSSHAIR)
    board.with_variable(dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus"))
    others = dashboard.DashboardLink("Ferryman").type(models.DashboardLinkType.DASHBOARDS).tags([TAG])
    return board.link(others.keep_time(True).include_vars(False).as_dropdown(False))


def label_variable(name: str, metric: str, label: str) -> dashboard.QueryVariable:
    """Return a choice among the values of a label, several or all of them."""
    variable = dashboard.QueryVariable(name).label(name.capitalize()).datasource(_DATASOURCE)
    variable.query(f"label_values({metric}, {label})").multi(True).include_all(True)
    variable.current(models.VariableOption(selected=True, text=["All"], value=["$__all"]))
    # A time range of the past lists the runs of that time.
    return variable.refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED).sort(models.VariableSort.ALPHABETICAL_ASC)


def finished(board: dashboard.Dashboard, rows: Mapping[str, Sequence[Builder[models.Panel]]]) -> models.Dashboard:
    """Return the dashboard with rows of panels, by their titles. Numbered panels keep the links to them valid."""
    for title, panels in rows.items():
        board.with_row(dashboard.Row(title))
        for panel in panels:
            board.with_panel(panel)
    built = board.build()
    for number, panel_or_row in enumerate(built.panels or (), start=1):
        panel_or_row.id_val = number
    return built


def _targets(queries: Iterable[Query]) -> list[prometheus.Dataquery]:
    return [
        prometheus.Dataquery()
        .expr(query.expression)
        .legend_format(query.legend)
        .range()
        .ref_id(chr(ord("A") + place))
        .datasource(_DATASOURCE)
        for place, query in enumerate(queries)
    ]


def _legend() -> common.VizLegendOptions:
    legend = common.VizLegendOptions().display_mode(common_models.LegendDisplayMode.LIST)
    return legend.placement(common_models.LegendPlacement.BOTTOM).show_legend(True)
