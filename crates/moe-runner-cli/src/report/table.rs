//! Aligned columns, and colour where a terminal shows it.

use std::io::IsTerminal;

use comfy_table::{CellAlignment, Table};

/// A table without lines: a header, and rows with two spaces between columns.
pub(crate) struct Columns {
    table: Table,
}

impl Columns {
    /// `header`: titles; those that begin with `>` head columns of numbers, which end flush.
    pub(crate) fn new(header: &[&str]) -> Self {
        let mut table = Table::new();
        table.load_style(comfy_table::presets::NOTHING);
        table.set_header(header.iter().map(|title| title.trim_start_matches('>')));
        for (index, title) in header.iter().enumerate() {
            if let Some(column) = table.column_mut(index) {
                column.set_padding((0, 2));
                if title.starts_with('>') {
                    column.set_cell_alignment(CellAlignment::Right);
                }
            }
        }
        Self { table }
    }

    /// Adds a row.
    pub(crate) fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.table.add_row(cells);
    }
}

impl std::fmt::Display for Columns {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for line in self.table.lines() {
            writeln!(f, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

/// Names and values, the names in one column. A value of several lines stays in its column.
pub(crate) struct Facts {
    rows: Vec<(&'static str, String)>,
}

impl Facts {
    pub(crate) fn new() -> Self {
        Self { rows: Vec::new() }
    }

    /// Adds a fact.
    pub(crate) fn add(&mut self, name: &'static str, value: impl Into<String>) {
        self.rows.push((name, value.into()));
    }
}

impl std::fmt::Display for Facts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let width = self.rows.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0);
        for (name, value) in &self.rows {
            for (i, line) in value.lines().enumerate() {
                writeln!(f, "  {:width$}  {line}", if i == 0 { name } else { "" })?;
            }
        }
        Ok(())
    }
}

/// What colour says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tone {
    Title,
    Good,
    Bad,
}

/// `text` in the tone's colour, where standard output is a terminal that wants colour.
pub(crate) fn toned(tone: Tone, text: &str) -> String {
    let off = !std::io::stdout().is_terminal()
        || std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty())
        || std::env::var_os("TERM").is_some_and(|term| term == "dumb");
    let code = match tone {
        _ if off => return text.to_owned(),
        Tone::Title => "1",
        Tone::Good => "1;32",
        Tone::Bad => "1;31",
    };
    format!("\x1b[{code}m{text}\x1b[0m")
}
