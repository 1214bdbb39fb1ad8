//! A measurement beside an earlier one.

use std::path::Path;

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::{BenchJson, Row};
use crate::failure::{one_line, unusable};
use crate::report::table::Columns;
use crate::report::units;

/// What `bench --json` wrote, as far as it is compared.
#[derive(Deserialize)]
pub(super) struct Earlier {
    layer: String,
    kernel: String,
    format: String,
    dtype: String,
    limits: Limits,
    rows: Vec<EarlierRow>,
}

#[derive(Deserialize)]
struct Limits {
    read_gbps: f64,
    threads: usize,
}

#[derive(Deserialize)]
struct EarlierRow {
    tokens: usize,
    median_s: f64,
    quartiles_s: [f64; 2],
}

/// Then and now.
#[derive(Serialize, Deserialize)]
pub(super) struct Comparison {
    kernel: String,
    format: String,
    dtype: String,
    threads: usize,
    /// What memory gave then: machines differ from day to day.
    read_gbps: f64,
    rows: Vec<Compared>,
}

#[derive(Serialize, Deserialize)]
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

impl Earlier {
    /// Reads a file that `bench --json` wrote.
    ///
    /// # Errors
    /// If it is none.
    pub(super) fn read(path: &Path) -> Result<Self> {
        let bad = |what: String| {
            unusable(format!(
                "--compare {}: {what}; it must be what `moe-runner bench --json` wrote",
                path.display()
            ))
        };
        let text = std::fs::read(path).map_err(|error| bad(error.to_string()))?;
        serde_json::from_slice(&text).map_err(|error| bad(error.to_string()))
    }

    /// Beside `now`.
    ///
    /// # Errors
    /// If it was another layer, or no row has the same tokens.
    pub(super) fn beside(self, now: &BenchJson) -> Result<Comparison> {
        if self.layer != now.layer {
            return Err(unusable(format!(
                "--compare: that was another layer, '{}'; this one is '{}'",
                one_line(&self.layer),
                one_line(&now.layer)
            )));
        }
        let with = |row: &Row| {
            self.rows.iter().find(|then| then.tokens == row.tokens).map(|then| compared(then, row))
        };
        let rows: Vec<Compared> = now.rows.iter().filter_map(with).collect();
        if rows.is_empty() {
            return Err(unusable(
                "--compare: that has other numbers of tokens; give the same --tokens",
            ));
        }
        let Self { kernel, format, dtype, limits: Limits { read_gbps, threads }, .. } = self;
        Ok(Comparison { kernel, format, dtype, threads, read_gbps, rows })
    }
}

fn compared(then: &EarlierRow, now: &Row) -> Compared {
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

impl Comparison {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_difference_is_one_only_where_quartiles_are_apart() {
        let then = EarlierRow { tokens: 4, median_s: 2.0, quartiles_s: [1.8, 2.4] };
        let now =
            |median_s, quartiles_s| Row { tokens: 4, median_s, quartiles_s, ..Row::default() };
        let faster = compared(&then, &now(1.0, [0.9, 1.2]));
        assert_eq!((faster.speed, faster.speed_range), (2.0, [1.8 / 1.2, 2.4 / 0.9]));
        assert!(faster.beyond_noise);
        assert!(!compared(&then, &now(1.9, [1.7, 2.1])).beyond_noise);
        let slower = compared(&then, &now(4.0, [3.0, 5.0]));
        assert!(slower.beyond_noise && slower.speed == 0.5);
    }
}
