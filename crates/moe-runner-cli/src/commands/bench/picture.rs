//! The times over the tokens, with both limits, as a picture.

use super::result::BenchJson;
use crate::commands::report::roofline::{machine, round_numbers, short, span};
use crate::commands::report::svg::{Anchor, Scale, Svg, number};
use crate::report::units::{plural, seconds};

const LEFT: f64 = 66.0;
const RIGHT: f64 = 970.0;
const TOP: f64 = 44.0;
const BOTTOM: f64 = 420.0;

/// The picture, as a file of its own.
pub(super) fn draw(json: &BenchJson) -> String {
    let mut rows: Vec<_> = json.rows.iter().collect();
    rows.sort_by_key(|row| row.tokens);
    let (least, most) = span(rows.iter().map(|row| row.tokens as f64));
    let across = (least / 1.25, most * 1.25);
    let times = rows.iter().flat_map(|row| {
        [row.median_s, row.quartiles_s[0], row.quartiles_s[1], row.limits_s[0], row.limits_s[1]]
    });
    // a limit far below says no more than that it is far below
    let (_, most) = span(rows.iter().map(|row| row.median_s));
    let (least, above) = span(times.filter(|time| *time > most / 1e5));
    let up = (least * 1e3 / 1.6, above * 1e3 * 1.6);
    let (x, y) = (Scale::log(across, (LEFT, RIGHT)), Scale::log(up, (BOTTOM, TOP)));
    let at = |tokens: usize, time: f64| (x.at(tokens as f64), y.at(time * 1e3));

    let mut svg = Svg::new();
    for value in round_numbers(up) {
        svg.line("grid", (LEFT, y.at(value)), (RIGHT, y.at(value)));
        svg.text("tick", (LEFT - 8.0, y.at(value) + 4.0), Anchor::End, &short(value));
    }
    for row in &rows {
        let column = x.at(row.tokens as f64);
        svg.line("grid", (column, TOP), (column, BOTTOM));
        svg.text("tick", (column, BOTTOM + 18.0), Anchor::Middle, &row.tokens.to_string());
    }
    svg.text("axis", ((LEFT + RIGHT) / 2.0, BOTTOM + 38.0), Anchor::Middle, "tokens");
    svg.text("axis", (4.0, TOP - 12.0), Anchor::Start, "ms");
    let (limits, machine) = (&json.limits, machine(&json.limits));
    let arithmetic = limits.gflops.iter().map(|(name, rate)| format!("{name} {}", short(*rate)));
    let lines = [
        ("limit", format!("memory allows: {} GB/s, {machine}", short(limits.read_gbps))),
        (
            "roof",
            format!("arithmetic allows: GFLOP/s {}", arithmetic.collect::<Vec<_>>().join(", ")),
        ),
    ];
    let mut bottom = BOTTOM + 66.0;
    for (limit, (class, name)) in lines.iter().enumerate() {
        let points = rows.iter().map(|row| at(row.tokens, row.limits_s[limit]));
        svg.path(class, &line(points), "");
        svg.path(class, &line([(LEFT, bottom - 4.0), (LEFT + 16.0, bottom - 4.0)].into_iter()), "");
        svg.text("tick", (LEFT + 24.0, bottom), Anchor::Start, name);
        bottom += 20.0;
    }
    svg.path("link", &line(rows.iter().map(|row| at(row.tokens, row.median_s))), "");
    for row in &rows {
        let [low, high] = row.quartiles_s.map(|time| at(row.tokens, time));
        svg.line("link", low, high);
        let title = format!(
            "{}: {}, {:.0} % of the limit ({})",
            plural(row.tokens, "token"),
            seconds(row.median_s),
            100.0 * row.limit_share,
            row.bound_by
        );
        let (column, height) = at(row.tokens, row.median_s);
        svg.circle("dot", (column, height), 5.0, &title);
        svg.text("tick", (column, height - 10.0), Anchor::Middle, &seconds(row.median_s));
    }
    svg.circle("dot", (LEFT + 8.0, bottom - 4.0), 5.0, "");
    let name = format!(
        "{}: {} weights, {} activations; median, and the middle half of all runs",
        json.kernel, json.format, json.dtype
    );
    svg.text("tick", (LEFT + 24.0, bottom), Anchor::Start, &name);
    svg.text("axis", (LEFT + 24.0, bottom + 20.0), Anchor::Start, &json.subject);
    svg.finish_alone(bottom + 30.0, "Time over tokens, with the limits of this machine")
}

/// A path through points.
fn line(points: impl Iterator<Item = (f64, f64)>) -> String {
    let points = points.map(|(x, y)| format!("{} {}", number(x), number(y)));
    format!("M{}", points.collect::<Vec<_>>().join("L"))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::super::result::{LimitsJson, Row};
    use super::*;

    #[test]
    fn both_limits_and_every_row_are_drawn() {
        let row = |tokens, median_s: f64| Row {
            tokens,
            median_s,
            quartiles_s: [median_s * 0.9, median_s * 1.1],
            limits_s: [5e-4, 1e-5 * tokens as f64],
            limit_share: 0.5,
            bound_by: "memory".into(),
            ..Row::default()
        };
        let json = BenchJson {
            subject: "a <layer>".into(),
            kernel: "cpu".into(),
            format: "bf16".into(),
            dtype: "bf16".into(),
            seed: 0,
            distinct_bytes: 1,
            cached: false,
            split: None,
            limits: LimitsJson {
                read_gbps: 20.0,
                gflops: BTreeMap::from([("f32".into(), 100.0)]),
                threads: 2,
                isa: "portable".into(),
                gpu: None,
            },
            ready_s: 0.0,
            rows: vec![row(16, 2e-3), row(1, 1e-3), row(256, 8e-3)],
        };
        let svg = draw(&json);
        assert!(svg.starts_with("<svg xmlns=\"http://www.w3.org/2000/svg\""), "{svg}");
        assert!(svg.trim_end().ends_with("</svg>") && svg.contains("a &lt;layer&gt;"));
        assert_eq!(svg.matches("<circle").count(), 4, "three rows, one in the legend");
        assert_eq!(svg.matches("class=\"limit\"").count(), 2);
        assert_eq!(svg.matches("class=\"roof\"").count(), 2);
        assert!(!svg.contains("NaN") && !svg.contains("inf"));
        // in the order of tokens, whatever that of the rows
        let path = svg.split("<path class=\"link\" d=\"M").nth(1).unwrap();
        let xs = path.split('"').next().unwrap().split('L');
        let xs: Vec<f64> = xs.map(|p| p.split(' ').next().unwrap().parse().unwrap()).collect();
        assert!(xs.is_sorted() && xs.len() == 3, "{xs:?}");
    }
}
