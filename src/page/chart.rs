//! Line charts and histograms as SVG, drawn by `plotters`: in the page's own colour where it has one,
//! so that they can be read on light and on dark ground.

use std::ops::Range;

use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::error::{Error, Result};

const SIZE: (u32, u32) = (480, 260);
/// Of the lines, in this order; each of them stands out from black and from white.
pub(super) const COLOURS: [&str; 7] =
    ["#3b82f6", "#f97316", "#16a34a", "#d946ef", "#ca8a04", "#0891b2", "#e11d48"];
/// Points of a line that a chart of this width can show.
const POINTS: usize = 400;

/// A line of a chart.
#[derive(Clone, Debug)]
pub(super) struct Line {
    pub(super) name: String,
    pub(super) points: Vec<(f64, f64)>,
    /// Whether points are marked, not only joined.
    pub(super) marked: bool,
}

/// How a chart's vertical axis grows.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Scale {
    /// Evenly.
    Linear,
    /// By powers of ten, where every value is above 0.
    Powers,
    /// Evenly, unless the largest value is far above the smallest.
    Either,
}

/// A chart of lines.
#[derive(Clone, Debug)]
pub(super) struct Chart {
    /// What the horizontal axis counts.
    pub(super) across: &'static str,
    pub(super) scale: Scale,
    pub(super) lines: Vec<Line>,
}

impl Chart {
    /// The drawing; absent where there is nothing to draw.
    pub(super) fn svg(&self) -> Result<Option<String>> {
        let finite = |(x, y): &(f64, f64)| x.is_finite() && y.is_finite();
        let mut lines = self.lines.clone();
        for line in &mut lines {
            line.points.retain(finite);
            line.points = thinned(&line.points);
        }
        let all = || lines.iter().flat_map(|line| &line.points);
        if all().count() < 2 {
            return Ok(None);
        }
        let positive = all().all(|(_, y)| *y > 0.0);
        let extent = |of: fn(&(f64, f64)) -> f64| {
            all().map(of).fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| {
                (low.min(value), high.max(value))
            })
        };
        let (low, high) = extent(|point| point.1);
        let logarithmic = positive
            && match self.scale {
                Scale::Linear => false,
                Scale::Powers => true,
                Scale::Either => high > 50.0 * low,
            };
        let place = |y: f64| if logarithmic { y.log10() } else { y };
        let (low, high) = (place(low), place(high));
        let margin = if high > low { 0.06 * (high - low) } else { 0.5 * high.abs().max(0.1) };
        let (first, last) = extent(|point| point.0);
        let last = if last > first { last } else { first + 1.0 };
        let axes = Axes {
            across: self.across,
            x: if self.across == "block" { &counted } else { &short },
            y: &|y| short(if logarithmic { 10f64.powf(y) } else { y }),
        };
        let svg = drawn(first..last, low - margin..high + margin, &axes, |chart| {
            for (index, line) in lines.iter().enumerate() {
                let colour = colour(index);
                let points = line.points.iter().map(|(x, y)| (*x, place(*y)));
                chart.draw_series(LineSeries::new(points.clone(), colour.stroke_width(2)))?;
                if line.marked {
                    let dots = points.map(|point| Circle::new(point, 3, colour.filled()));
                    chart.draw_series(dots)?;
                }
            }
            Ok(())
        });
        svg.map(Some)
    }
}

/// Bars over neighbouring ranges, edges one more than counts; absent where there is nothing.
pub(super) fn bars(edges: &[f64], counts: &[f64], across: &str) -> Result<Option<String>> {
    let total: f64 = counts.iter().sum();
    let (Some(first), Some(last)) = (edges.first(), edges.last()) else { return Ok(None) };
    if total <= 0.0 || edges.len() != counts.len() + 1 || last <= first {
        return Ok(None);
    }
    let whole = edges.iter().all(|edge| ((edge + 0.5) - (edge + 0.5).round()).abs() < 1e-9);
    let highest = counts.iter().copied().fold(0.0, f64::max) / total * 100.0;
    // Of codes, whose middles are whole numbers, those alone.
    let axes = Axes {
        across,
        x: if whole { &counted } else { &short },
        y: &|y| format!("{} %", short(y)),
    };
    let svg = drawn(*first..*last, 0.0..highest * 1.06, &axes, |chart| {
        let bars = edges.windows(2).zip(counts).map(|(edges, count)| {
            let gap = 0.08 * (edges[1] - edges[0]);
            let corners = [(edges[0] + gap, 0.0), (edges[1] - gap, count / total * 100.0)];
            Rectangle::new(corners, colour(0).filled())
        });
        chart.draw_series(bars).map(drop)
    });
    svg.map(Some)
}

/// What stands at a chart's axes.
struct Axes<'a> {
    /// What the horizontal one counts.
    across: &'a str,
    /// Labels of the horizontal and of the vertical one.
    x: &'a dyn Fn(f64) -> String,
    y: &'a dyn Fn(f64) -> String,
}

/// Where a chart is drawn.
type Plane<'a> = ChartContext<'a, SVGBackend<'a>, Cartesian2d<RangedCoordf64, RangedCoordf64>>;

/// What a drawing fails with.
type Failed = DrawingAreaErrorKind<std::io::Error>;

/// A chart over these ranges as SVG; `paint` draws what is in it.
fn drawn(
    across: Range<f64>,
    up: Range<f64>,
    axes: &Axes<'_>,
    paint: impl FnOnce(&mut Plane<'_>) -> Result<(), Failed>,
) -> Result<String> {
    let mut svg = String::new();
    let drawn = (|| {
        let area = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        let mut chart = ChartBuilder::on(&area)
            .margin(10)
            .x_label_area_size(38)
            .y_label_area_size(62)
            .build_cartesian_2d(across, up)?;
        chart
            .configure_mesh()
            .light_line_style(TRANSPARENT)
            .bold_line_style(BLACK.mix(0.12))
            .axis_style(BLACK.mix(0.5))
            .x_labels(7)
            .y_labels(6)
            .x_desc(axes.across)
            .x_label_style(label())
            .y_label_style(label())
            .axis_desc_style(label())
            .x_label_formatter(&|x| (axes.x)(*x))
            .y_label_formatter(&|y| (axes.y)(*y))
            .draw()?;
        paint(&mut chart)?;
        area.present()
    })();
    drawn.map_err(|e: Failed| Error::failed(format!("a chart cannot be drawn: {e}")))?;
    Ok(adapted(&svg))
}

fn label() -> TextStyle<'static> {
    let font = ("sans-serif", 14).into_font();
    TextStyle::from(font).color(&BLACK).pos(Pos::new(HPos::Center, VPos::Center))
}

fn colour(index: usize) -> RGBColor {
    let text = COLOURS[index % COLOURS.len()];
    let part = |at: usize| u8::from_str_radix(&text[at..at + 2], 16).unwrap_or(0);
    RGBColor(part(1), part(3), part(5))
}

/// As wide as its place, in the colour of the text around it.
fn adapted(svg: &str) -> String {
    let [width, height] = [SIZE.0, SIZE.1].map(|size| size.to_string());
    svg.replacen(&format!("width=\"{width}\" height=\"{height}\""), "role=\"img\"", 1)
        .replace("#000000", "currentColor")
}

/// A label of an axis.
/// Of what is counted: no label between two of it.
fn counted(value: f64) -> String {
    if (value - value.round()).abs() < 1e-9 { format!("{value:.0}") } else { String::new() }
}

fn short(value: f64) -> String {
    let size = value.abs();
    if size < 1e-12 {
        "0".to_owned()
    } else if !(1e-3..1e5).contains(&size) {
        format!("{value:.1e}")
    } else if size >= 100.0 {
        format!("{value:.0}")
    } else {
        let decimals = if size >= 10.0 { 1 } else { 3 };
        let text = format!("{value:.decimals$}");
        text.trim_end_matches('0').trim_end_matches('.').to_owned()
    }
}

/// Means of neighbours, where there are more points than can be seen.
fn thinned(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let run = points.len().div_ceil(POINTS).max(1);
    let mean = |points: &[(f64, f64)], of: fn(&(f64, f64)) -> f64| {
        points.iter().map(of).sum::<f64>() / points.len() as f64
    };
    points.chunks(run).map(|run| (mean(run, |p| p.0), mean(run, |p| p.1))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chart_takes_the_colour_of_its_page() {
        let points = (0..1000).map(|x| (f64::from(x), f64::from(x + 1).powi(2))).collect();
        let line = Line { name: "loss".into(), points, marked: false };
        let chart = Chart { across: "step", scale: Scale::Either, lines: vec![line] };
        let svg = chart.svg().unwrap().unwrap();
        assert!(svg.starts_with("<svg role=\"img\"") && svg.contains("currentColor"), "{svg}");
        assert!(!svg.contains("#000000") && svg.contains(&COLOURS[0].to_uppercase()));
        // Four powers of ten and more: a logarithmic axis.
        assert!(svg.contains("1.0e6") || svg.contains("1.0e5"), "{svg}");
    }

    #[test]
    fn nothing_and_what_is_no_number_is_not_drawn() {
        let of = |points: Vec<(f64, f64)>| {
            let lines = vec![Line { name: String::new(), points, marked: true }];
            Chart { across: "step", scale: Scale::Powers, lines }.svg().unwrap()
        };
        assert!(of(vec![]).is_none());
        assert!(of(vec![(0.0, f64::NAN), (1.0, f64::INFINITY), (2.0, 1.0)]).is_none());
        assert!(of(vec![(0.0, 1.0), (1.0, 1.0)]).is_some());
        assert!(of(vec![(0.0, -1.0), (1.0, 0.0)]).is_some());
        assert!(bars(&[0.0, 1.0], &[0.0], "code").unwrap().is_none());
        assert!(bars(&[0.0, 1.0, 2.0], &[1.0, 3.0], "code").unwrap().is_some());
    }
}
