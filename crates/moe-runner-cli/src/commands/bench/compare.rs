//! A measurement beside an earlier one.

use anyhow::Result;
use serde::Serialize;

use super::result::{BenchJson, LimitsJson, Row};
use crate::failure::{one_line, unusable};
use crate::report::table::Columns;
use crate::report::units;

/// Then and now.
#[derive(Serialize)]
pub(super) struct Comparison {
    kernel: String,
    format: String,
    dtype: String,
    threads: usize,
    /// What memory gave then: machines differ from day to day.
    read_gbps: f64,
    rows: Vec<Compared>,
}

#[derive(Serialize)]
struct Compared {
    tokens: usize,
    median_s: f64,
    /// How many times as fast it is now: the medians.
    speed: f64,
    /// The same of the worse and the better quartiles of both.
    speed_range: [f64; 2],
    /// Whether the quartiles are apart.
    beyond_noise: bool,
}

impl Comparison {
    /// Of `then`, which an earlier run wrote, and `now`.
    ///
    /// # Errors
    /// If it was another layer, or no row has the same tokens.
    pub(super) fn of(then: BenchJson, now: &BenchJson) -> Result<Self> {
        if then.subject != now.subject {
            return Err(unusable(format!(
                "--compare: that was another layer, '{}'; this one is '{}'",
                one_line(&then.subject),
                one_line(&now.subject)
            )));
        }
        let with = |row: &Row| {
            then.rows.iter().find(|then| then.tokens == row.tokens).map(|then| compared(then, row))
        };
        let rows: Vec<Compared> = now.rows.iter().filter_map(with).collect();
        if rows.is_empty() {
            return Err(unusable(
                "--compare: that has other numbers of tokens; give the same --tokens",
            ));
        }
        let BenchJson { kernel, format, dtype, limits, .. } = then;
        let LimitsJson { read_gbps, threads, .. } = limits;
        Ok(Self { kernel, format, dtype, threads, read_gbps, rows })
    }

    /// The rows for a person, `now_gbps` being the memory's rate now.
    pub(super) fn text(&self, now_gbps: f64) -> String {
        let mut table = Columns::new(&[">tokens", ">then", ">speed", ">quartiles", "difference"]);
        for row in &self.rows {
            let [least, most] = row.speed_range;
            table.row([
                row.tokens.to_string(),
                units::seconds(row.median_s),
                format!("{:.2}x", row.speed),
                format!("{least:.2}-{most:.2}"),
                match (row.beyond_noise, row.speed > 1.0) {
                    (false, _) => "within the noise",
                    (true, true) => "faster",
                    (true, false) => "slower",
                }
                .into(),
            ]);
        }
        let Self { kernel, format, dtype, threads, read_gbps, .. } = self;
        format!(
            "\nCompared with {format}, {dtype} activations, {kernel}, {}; memory gave {read_gbps:.1} GB/s then, \
             {now_gbps:.1} now\n{table}",
            units::plural(*threads, "thread")
        )
    }
}

fn compared(then: &Row, now: &Row) -> Compared {
    let [fast, slow] = now.quartiles_s;
    let speed_range = [then.quartiles_s[0] / slow, then.quartiles_s[1] / fast];
    Compared {
        tokens: now.tokens,
        median_s: then.median_s,
        speed: then.median_s / now.median_s,
        speed_range,
        beyond_noise: speed_range[0] > 1.0 || speed_range[1] < 1.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_difference_is_one_only_where_quartiles_are_apart() {
        let row =
            |median_s, quartiles_s| Row { tokens: 4, median_s, quartiles_s, ..Row::default() };
        let then = row(2.0, [1.8, 2.4]);
        let faster = compared(&then, &row(1.0, [0.9, 1.2]));
        assert_eq!((faster.speed, faster.speed_range), (2.0, [1.8 / 1.2, 2.4 / 0.9]));
        assert!(faster.beyond_noise);
        assert!(!compared(&then, &row(1.9, [1.7, 2.1])).beyond_noise);
        let slower = compared(&then, &row(4.0, [3.0, 5.0]));
        assert!(slower.beyond_noise && slower.speed == 0.5);
    }
}
