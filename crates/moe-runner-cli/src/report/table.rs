//! Aligned columns, and colour where a terminal shows it.

use std::fmt;
use std::io::IsTerminal;

use super::width::{shown, width, wrap};

/// Columns of a value beside its name, below which it goes to lines of its own.
const LEAST: usize = 24;

/// A table without lines: a header, and rows with two spaces between columns. Where it is too wide
/// for the terminal, its columns go below each other in groups, each with the first column; a column
/// that is too wide by itself breaks between words.
pub(crate) struct Columns {
    /// Titles, and whether the column ends flush.
    header: Vec<(String, bool)>,
    rows: Vec<Vec<String>>,
    width: Option<usize>,
}

impl Columns {
    /// `header`: titles; those that begin with `>` head columns of numbers, which end flush.
    pub(crate) fn new(header: &[&str]) -> Self {
        let titles = header.iter().map(|title| match title.strip_prefix('>') {
            Some(title) => (title.to_owned(), true),
            None => (title.to_string(), false),
        });
        Self { header: titles.collect(), rows: Vec::new(), width: width() }
    }

    /// Adds a row; columns that it lacks are empty.
    pub(crate) fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        let mut cells: Vec<String> = cells.into_iter().collect();
        cells.resize(self.header.len(), String::new());
        self.rows.push(cells);
    }

    fn column_width(&self, column: usize) -> usize {
        let cells = self.rows.iter().map(|row| shown(&row[column]));
        cells.fold(shown(&self.header[column].0), usize::max)
    }

    /// Columns that stand beside each other, and how wide each is.
    fn groups(&self) -> Vec<Vec<(usize, usize)>> {
        let limit = self.width.unwrap_or(usize::MAX);
        let key = self.column_width(0);
        let mut groups = vec![vec![(0, key)]];
        let mut used = key;
        for column in 1..self.header.len() {
            let wanted = self.column_width(column);
            if used.saturating_add(2 + wanted) > limit && groups.last().is_some_and(|g| g.len() > 1)
            {
                groups.push(vec![(0, key)]);
                used = key;
            }
            let room = limit.saturating_sub(used + 2).max(LEAST.min(wanted));
            let taken = wanted.min(room);
            used = used.saturating_add(2 + taken);
            if let Some(group) = groups.last_mut() {
                group.push((column, taken));
            }
        }
        groups
    }
}

impl fmt::Display for Columns {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let titles: Vec<String> = self.header.iter().map(|(title, _)| title.clone()).collect();
        for (i, group) in self.groups().iter().enumerate() {
            if i > 0 {
                writeln!(f)?;
            }
            for row in std::iter::once(&titles).chain(&self.rows) {
                let wrapped: Vec<String> = group
                    .iter()
                    .map(|(column, width)| wrap(&row[*column], Some(*width), ""))
                    .collect();
                let cells: Vec<Vec<&str>> =
                    wrapped.iter().map(|cell| cell.lines().collect()).collect();
                let lines = cells.iter().map(Vec::len).max().unwrap_or(0).max(1);
                for line in 0..lines {
                    let mut out = String::new();
                    for ((column, width), cell) in group.iter().zip(&cells) {
                        let text = cell.get(line).copied().unwrap_or_default();
                        let fill = " ".repeat(width.saturating_sub(shown(text)));
                        let flush = self.header[*column].1;
                        let (before, after) = if flush { (&*fill, "") } else { ("", &*fill) };
                        out += &format!("{before}{text}{after}  ");
                    }
                    writeln!(f, "{}", out.trim_end())?;
                }
            }
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

/// A line of a value, in lines of at most `room` columns.
fn lines(line: &str, room: Option<usize>) -> Vec<String> {
    wrap(line, room, "").lines().map(str::to_owned).collect()
}

impl fmt::Display for Facts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = self.rows.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0);
        let room = width().map(|width| width.saturating_sub(4 + names));
        let below = room.is_some_and(|room| room < LEAST);
        for (name, value) in &self.rows {
            if below {
                writeln!(f, "  {name}")?;
                let room = width().map(|width| width.saturating_sub(4));
                for line in value.lines().flat_map(|line| lines(line, room)) {
                    writeln!(f, "    {line}")?;
                }
                continue;
            }
            for (i, line) in value.lines().flat_map(|line| lines(line, room)).enumerate() {
                let name = if i == 0 { name } else { "" };
                writeln!(f, "  {name:names$}  {line}")?;
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

#[cfg(test)]
mod tests {
    use super::*;

    fn table(width: Option<usize>) -> String {
        let mut table = Columns::new(&[">layer", "kernel", ">time", "what it is"]);
        table.width = width;
        table.row(["3", "cpu_avx512", "1.2 ms", "some words that go on"].map(String::from));
        table.row(["12".to_owned(), "reference".to_owned()]);
        table.to_string()
    }

    #[test]
    fn a_table_is_as_wide_as_it_is_where_nobody_minds() {
        let wide = "layer  kernel        time  what it is\n    3  cpu_avx512  1.2 ms  some words that \
                    go on\n   12  reference\n";
        assert_eq!(table(None), wide);
        assert_eq!(table(Some(200)), wide);
    }

    #[test]
    fn columns_go_below_each_other_and_words_stay_whole() {
        let narrow = "layer  kernel        time\n    3  cpu_avx512  1.2 ms\n   12  reference\n\nlayer  \
                      what it is\n    3  some words that go on\n   12\n";
        assert_eq!(table(Some(30)), narrow);
        for width in 40..200 {
            let table = table(Some(width));
            assert!(table.lines().all(|line| line.chars().count() <= width), "{width}:\n{table}");
            for word in ["kernel", "cpu_avx512", "1.2 ms", "words"] {
                assert!(table.contains(word), "{width}:\n{table}");
            }
        }
    }
}
