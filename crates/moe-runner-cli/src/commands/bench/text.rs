//! The measurement as people read it.

use crate::failure::one_line;
use crate::measure::MachineLimits;
use crate::report::table::{Columns, Facts};
use crate::report::units::{self, plural};
use crate::splitting;

use super::compare::Comparison;
use super::result::BenchJson;

/// Facts, a row for each number of tokens, and what stands beside them.
pub(super) fn of(
    json: &BenchJson,
    compared: Option<&Comparison>,
    why: &str,
    machine: &MachineLimits,
) -> String {
    let mut facts = Facts::new();
    facts.add("layer", one_line(&json.subject));
    facts.add(
        "weights",
        format!(
            "{}, {} of them distinct; {} activations",
            json.format,
            units::bytes(json.distinct_bytes),
            json.dtype
        ),
    );
    facts.add("kernel", format!("{} ({why})", json.kernel));
    facts.add("ready", format!("after {}", units::seconds(json.ready_s)));
    facts.add("machine", machine.to_string());
    if let Some(sizes) = &json.split {
        facts.add("split", splitting::describe(sizes));
    }
    let mut columns = vec![
        ">tokens",
        ">median",
        ">min",
        ">quartiles",
        ">max",
        ">tokens/s",
        ">GB/s",
        ">GFLOP/s",
        ">limit",
        "bound by",
    ];
    if json.split.is_some() {
        columns.push(">moved/token");
    }
    let mut table = Columns::new(&columns);
    for row in &json.rows {
        let moved = row.bytes_moved_per_token.map(|bytes| units::bytes(bytes.round() as usize));
        let cells = [
            row.tokens.to_string(),
            units::seconds(row.median_s),
            units::seconds(row.min_s),
            row.quartiles_s.map(units::seconds).join(" - "),
            units::seconds(row.max_s),
            format!("{:.0}", row.tokens_per_s),
            format!("{:.1}", row.gbps),
            format!("{:.1}", row.gflops),
            format!("{:.0} %", 100.0 * row.limit_share),
            row.bound_by.clone(),
        ];
        table.row(cells.into_iter().chain(moved));
    }
    let cached = match json.cached {
        true => {
            "\nThese weights may stay in the caches: few tokens then measure those, not memory."
        }
        false => "",
    };
    let mut exchanges = String::new();
    for (row, exchange) in json.rows.iter().filter_map(|row| Some((row, row.exchange.as_ref()?))) {
        exchanges += &format!(
            "\n{}: dispatch and combine {}, the same bytes alone {} ({} from the busiest rank)",
            plural(row.tokens, "token"),
            units::seconds(exchange.seconds),
            units::seconds(exchange.bare_seconds),
            units::bytes(exchange.sent as usize),
        );
    }
    let compared = compared.map(|compared| compared.text(json.limits.read_gbps));
    format!("{facts}\n{table}{exchanges}{cached}{}", compared.unwrap_or_default())
}
