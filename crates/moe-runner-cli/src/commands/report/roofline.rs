//! Kernels below this machine's limits: operations a byte across, operations a second up.

use super::super::bench::result::{BenchJson, LimitsJson};
use super::super::check::CheckJson;
use super::html::{figure, paragraph, table};
use super::svg::{Anchor, Scale, Svg, number};
use crate::report::units::{plural, seconds};

/// Measured runs that belong together.
struct Series {
    /// In a word or two.
    short: String,
    name: String,
    points: Vec<Point>,
}

struct Point {
    /// What stands beside it.
    label: String,
    title: String,
    tokens: usize,
    median_s: f64,
    gbps: f64,
    limit_share: f64,
    /// Operations for a byte of weights that is read.
    intensity: f64,
    gflops: f64,
}

/// A machine's limits.
struct Roof {
    machine: String,
    read_gbps: f64,
    /// By arithmetic.
    gflops: Vec<(String, f64)>,
}

/// The section.
pub(super) fn section(check: &CheckJson, bench: &[BenchJson]) -> String {
    let (series, roofs, source) = match bench {
        [] => match of_check(check) {
            Some((series, roof)) => {
                (series, vec![roof], "The layers were timed as they were checked.")
            }
            None => {
                return paragraph(
                    "Nothing was timed. moe-runner bench --json measures a layer against this machine's \
                     limits, and report --bench draws that here.",
                );
            }
        },
        _ => (
            bench.iter().map(of_bench).collect(),
            roofs(bench),
            "Runs are those of moe-runner bench.",
        ),
    };
    if series.iter().all(|series| series.points.is_empty()) {
        return paragraph("No layer could be run: there is nothing to time.");
    }
    let caption = format!(
        "No kernel can be above the lines: the slope is what memory delivers, the flat part what the \
         arithmetic units do, both measured in the same run. Few tokens stand on the left, where weights \
         are read for little arithmetic; points above the slope had their weights in a cache. Numbers \
         beside the points are tokens of a batch. {source}"
    );
    figure(&draw(&series, &roofs), &caption) + &numbers(&series)
}

/// All points, as numbers.
fn numbers(series: &[Series]) -> String {
    let titles = [
        "kernel",
        ">tokens",
        ">median",
        ">GB/s",
        ">GFLOP/s",
        ">operations a byte",
        ">share of the limit",
    ];
    let rows = series.iter().flat_map(|series| series.points.iter().map(move |p| (series, p)));
    let rows = rows.take(40).map(|(series, p)| {
        [
            series.short.clone(),
            p.tokens.to_string(),
            seconds(p.median_s),
            format!("{:.1}", p.gbps),
            format!("{:.1}", p.gflops),
            format!("{:.2}", p.intensity),
            format!("{:.0} %", 100.0 * p.limit_share),
        ]
    });
    table(&titles, rows)
}

fn of_bench(bench: &BenchJson) -> Series {
    let points = bench.rows.iter().map(|row| Point {
        label: row.tokens.to_string(),
        title: format!(
            "{}, {}: {}, {:.1} GFLOP/s, {:.1} GB/s, {:.0} % of the limit",
            bench.kernel,
            bench.format,
            plural(row.tokens, "token"),
            row.gflops,
            row.gbps,
            100.0 * row.limit_share
        ),
        tokens: row.tokens,
        median_s: row.median_s,
        gbps: row.gbps,
        limit_share: row.limit_share,
        intensity: row.flops / row.bytes_weights_read,
        gflops: row.gflops,
    });
    Series {
        short: format!("{}, {}", bench.kernel, bench.format),
        name: format!(
            "{}: {} weights, {} activations; {}",
            bench.kernel, bench.format, bench.dtype, bench.subject
        ),
        points: points.collect(),
    }
}

/// Of each machine, the most that any run saw of it.
fn roofs(bench: &[BenchJson]) -> Vec<Roof> {
    let mut roofs: Vec<Roof> = Vec::new();
    for limits in bench.iter().map(|bench| &bench.limits) {
        let machine = machine(limits);
        let at = roofs.iter().position(|roof| roof.machine == machine).unwrap_or_else(|| {
            roofs.push(Roof { machine, read_gbps: 0.0, gflops: Vec::new() });
            roofs.len() - 1
        });
        let roof = &mut roofs[at];
        roof.read_gbps = roof.read_gbps.max(limits.read_gbps);
        for (arithmetic, rate) in &limits.gflops {
            match roof.gflops.iter_mut().find(|(name, _)| name == arithmetic) {
                Some((_, known)) => *known = known.max(*rate),
                None => roof.gflops.push((arithmetic.clone(), *rate)),
            }
        }
    }
    roofs
}

pub(in crate::commands) fn machine(limits: &LimitsJson) -> String {
    match &limits.gpu {
        Some(gpu) => gpu.name.clone(),
        None => format!("{}, {}", plural(limits.threads, "thread"), limits.isa),
    }
}

/// The times that `check` took.
fn of_check(check: &CheckJson) -> Option<(Vec<Series>, Roof)> {
    let machine = check.machine.as_ref()?;
    let mut series: Vec<Series> = Vec::new();
    // many layers of one model lie in one heap: their first has the label
    for (i, layer) in check.layers.iter().enumerate() {
        for speed in &layer.speed {
            let name =
                format!("{}, {}", layer.kernel.unwrap_or("-"), plural(speed.tokens, "token"));
            let point = Point {
                label: if i == 0 { speed.tokens.to_string() } else { String::new() },
                title: format!(
                    "layer {}, {name}: {:.1} GFLOP/s, {:.1} GB/s, {:.0} % of the limit",
                    layer.layer,
                    speed.gflops,
                    speed.gbps,
                    100.0 * speed.limit_share
                ),
                tokens: speed.tokens,
                median_s: speed.median_s,
                gbps: speed.gbps,
                limit_share: speed.limit_share,
                intensity: speed.flops / (speed.bytes_weights_read as f64).max(1.0),
                gflops: speed.gflops,
            };
            match series.iter_mut().find(|series| series.name == name) {
                Some(series) => series.points.push(point),
                None => {
                    let short = layer.kernel.unwrap_or("-").to_owned();
                    series.push(Series { short, name, points: vec![point] });
                }
            }
        }
    }
    let roof = Roof {
        machine: match &machine.gpu {
            Some(gpu) => gpu.name.clone(),
            None => format!("{}, {}", plural(machine.threads, "thread"), machine.isa),
        },
        read_gbps: machine.device_read_gbps(),
        gflops: machine.gflops().into_iter().collect(),
    };
    Some((series, roof))
}

const LEFT: f64 = 66.0;
const RIGHT: f64 = 970.0;
const TOP: f64 = 26.0;
const BOTTOM: f64 = 400.0;

fn draw(series: &[Series], roofs: &[Roof]) -> String {
    let points = || series.iter().flat_map(|series| &series.points);
    let ridges =
        roofs.iter().flat_map(|roof| roof.gflops.iter().map(|(_, rate)| rate / roof.read_gbps));
    let (least, most) = span(points().map(|p| p.intensity).chain(ridges));
    let across = (least / 1.6, most * 2.5);
    let heights = roofs.iter().flat_map(|roof| roof.gflops.iter().map(|(_, rate)| *rate));
    let (least, most) = span(points().map(|p| p.gflops).chain(heights));
    let up = (least / 1.6, most * 1.6);
    let (x, y) = (Scale::log(across, (LEFT, RIGHT)), Scale::log(up, (BOTTOM, TOP)));

    let mut svg = Svg::new();
    for value in round_numbers(across) {
        svg.line("grid", (x.at(value), TOP), (x.at(value), BOTTOM));
        svg.text("tick", (x.at(value), BOTTOM + 18.0), Anchor::Middle, &short(value));
    }
    for value in round_numbers(up) {
        svg.line("grid", (LEFT, y.at(value)), (RIGHT, y.at(value)));
        svg.text("tick", (LEFT - 8.0, y.at(value) + 4.0), Anchor::End, &short(value));
    }
    let middle = (LEFT + RIGHT) / 2.0;
    let what = "operations for a byte of weights read";
    svg.text("axis", (middle, BOTTOM + 38.0), Anchor::Middle, what);
    svg.text("axis", (4.0, TOP - 12.0), Anchor::Start, "GFLOP/s");
    // labels do not cover each other
    let mut taken = Vec::new();
    for (i, roof) in roofs.iter().enumerate() {
        draw_roof(&mut svg, roof, (x, y), (across, up), &mut taken, roofs.len() > 1 || i > 0);
    }
    for (shape, series) in series.iter().enumerate() {
        for point in &series.points {
            let at = (x.at(point.intensity), y.at(point.gflops));
            svg.path(&format!("point s{}", shape % SHAPES), &outline(shape, at, 5.5), &point.title);
            taken.push((at.0 - 6.0, at.1 - 6.0, 12.0, 12.0));
        }
    }
    for point in points().filter(|point| !point.label.is_empty()) {
        place(&mut svg, (x.at(point.intensity), y.at(point.gflops)), &point.label, &mut taken);
    }
    let mut bottom = BOTTOM + 66.0;
    for (shape, series) in series.iter().enumerate() {
        let mark = outline(shape, (LEFT + 8.0, bottom - 4.0), 5.5);
        svg.path(&format!("point s{}", shape % SHAPES), &mark, "");
        svg.text("tick", (LEFT + 24.0, bottom), Anchor::Start, &series.name);
        bottom += 20.0;
    }
    svg.finish(bottom, "Roofline: kernels below the limits of this machine")
}

/// The slope of memory and the flat lines of arithmetic.
fn draw_roof(
    svg: &mut Svg,
    roof: &Roof,
    (x, y): (Scale, Scale),
    (across, up): ((f64, f64), (f64, f64)),
    taken: &mut Vec<(f64, f64, f64, f64)>,
    named: bool,
) {
    let of = if named { format!(" ({})", roof.machine) } else { String::new() };
    for (arithmetic, rate) in &roof.gflops {
        // the slope enters the picture at its left or lower edge
        let from = across.0.max(up.0 / roof.read_gbps);
        let ridge = rate / roof.read_gbps;
        let corner = (x.at(ridge), y.at(*rate));
        let d = format!(
            "M{} {}L{} {}H{}",
            number(x.at(from)),
            number(y.at(from * roof.read_gbps)),
            number(corner.0),
            number(corner.1),
            number(RIGHT)
        );
        svg.path("roof", &d, "");
        let words = format!("{arithmetic}: {} GFLOP/s{of}", short(*rate));
        svg.text("tick", (RIGHT, corner.1 - 7.0), Anchor::End, &words);
        taken.push((RIGHT - 7.0 * words.len() as f64, corner.1 - 20.0, 400.0, 18.0));
    }
    let lowest = roof.gflops.iter().map(|(_, rate)| *rate).fold(f64::INFINITY, f64::min);
    let from = across.0.max(up.0 / roof.read_gbps);
    // in the middle of the slope, on its left
    let at = (from * (lowest / roof.read_gbps)).sqrt();
    let (px, py) = (x.at(at), y.at(at * roof.read_gbps));
    let words = format!("memory: {} GB/s{of}", short(roof.read_gbps));
    let width = 6.6 * words.len() as f64;
    match px - 10.0 - width > LEFT {
        true => {
            svg.text("tick", (px - 10.0, py - 4.0), Anchor::End, &words);
            taken.push((px - 10.0 - width, py - 18.0, width, 18.0));
        }
        false => {
            svg.text("tick", (px + 14.0, py + 14.0), Anchor::Start, &words);
            taken.push((px + 14.0, py, width, 18.0));
        }
    }
}

/// A label beside its point, where nothing is yet; without any such place, none.
fn place(svg: &mut Svg, (x, y): (f64, f64), label: &str, taken: &mut Vec<(f64, f64, f64, f64)>) {
    let width = 7.0 * label.chars().count() as f64;
    let places = [
        (x - width / 2.0, y - 10.0),
        (x + 10.0, y + 4.0),
        (x - width / 2.0, y + 19.0),
        (x - width - 10.0, y + 4.0),
    ];
    let free = |(left, base): &(f64, f64)| {
        let (top, right) = (base - 11.0, left + width);
        taken.iter().all(|(l, t, w, h)| right < *l || l + w < *left || *base < *t || t + h < top)
    };
    if let Some((left, base)) = places.into_iter().find(free) {
        svg.text("tick", (left, base), Anchor::Start, label);
        taken.push((left, base - 11.0, width, 11.0));
    }
}

/// Outlines that are told apart without colour.
const SHAPES: usize = 6;

/// The outline of a series' points; after all have been used, they are hollow by the style sheet.
fn outline(shape: usize, (x, y): (f64, f64), r: f64) -> String {
    let corners = |corners: &[(f64, f64)]| {
        let corners =
            corners.iter().map(|(dx, dy)| format!("{} {}", number(x + dx * r), number(y + dy * r)));
        format!("M{}z", corners.collect::<Vec<_>>().join("L"))
    };
    match shape % SHAPES {
        0 => format!(
            "M{0} {y}a{r} {r} 0 1 0 {d} 0a{r} {r} 0 1 0 -{d} 0z",
            number(x - r),
            y = number(y),
            d = number(2.0 * r)
        ),
        1 => corners(&[(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)]),
        2 => corners(&[(0.0, -1.15), (1.1, 0.85), (-1.1, 0.85)]),
        3 => corners(&[(0.0, -1.3), (1.3, 0.0), (0.0, 1.3), (-1.3, 0.0)]),
        4 => corners(&[(0.0, 1.15), (1.1, -0.85), (-1.1, -0.85)]),
        _ => corners(&[
            (-0.4, -1.2),
            (0.4, -1.2),
            (0.4, -0.4),
            (1.2, -0.4),
            (1.2, 0.4),
            (0.4, 0.4),
            (0.4, 1.2),
            (-0.4, 1.2),
            (-0.4, 0.4),
            (-1.2, 0.4),
            (-1.2, -0.4),
            (-0.4, -0.4),
        ]),
    }
}

pub(in crate::commands) fn span(values: impl Iterator<Item = f64>) -> (f64, f64) {
    let usable = values.filter(|v| v.is_finite() && *v > 0.0);
    let (least, most) =
        usable.fold((f64::INFINITY, f64::NEG_INFINITY), |(l, m), v| (l.min(v), m.max(v)));
    if least <= most { (least, most) } else { (1.0, 10.0) }
}

/// 1, 2, 5, 10, … within; only powers of ten where there are many.
pub(in crate::commands) fn round_numbers((from, to): (f64, f64)) -> Vec<f64> {
    let decades = (to / from).log10();
    let factors: &[f64] = match decades {
        d if d > 5.0 => &[1.0],
        d if d > 3.5 => &[1.0, 3.0],
        _ => &[1.0, 2.0, 5.0],
    };
    let powers = from.log10().floor() as i32..=to.log10().ceil() as i32;
    let all = powers.flat_map(|power| factors.iter().map(move |f| f * 10f64.powi(power)));
    all.filter(|v| (from..=to).contains(v)).collect()
}

/// A number with as many digits as it needs: `0.05`, `2`, `12.3`, `400`.
pub(in crate::commands) fn short(value: f64) -> String {
    match value {
        v if v >= 100.0 => format!("{v:.0}"),
        v if v >= 10.0 => number((v * 10.0).round() / 10.0),
        v if v >= 0.1 => number(v),
        v => format!("{:.0e}", v),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axes_have_round_numbers() {
        assert_eq!(round_numbers((0.4, 11.0)), [0.5, 1.0, 2.0, 5.0, 10.0]);
        assert_eq!(round_numbers((1.0, 2e6)).len(), 7);
        assert_eq!(["0.5", "2", "12.3", "4001"], [0.5, 2.0, 12.34, 4001.2].map(short));
    }

    #[test]
    fn labels_do_not_cover_each_other() {
        let (mut svg, mut taken) = (Svg::new(), Vec::new());
        for _ in 0..6 {
            place(&mut svg, (100.0, 100.0), "16", &mut taken);
        }
        // four places around a point
        assert_eq!(svg.finish(1.0, "").matches("<text").count(), 4);
    }
}
