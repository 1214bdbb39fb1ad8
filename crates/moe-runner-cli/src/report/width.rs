//! Lines that fit the terminal, and break between words only.

use terminal_size::{Width, terminal_size_of};

/// Columns that a line of standard output may have: those of `COLUMNS`, where it is set, else of the
/// terminal; `None`, where it is none: lines are as long as they are.
pub(crate) fn width() -> Option<usize> {
    let told = std::env::var("COLUMNS").ok().and_then(|columns| columns.parse().ok());
    let terminal = || terminal_size_of(std::io::stdout()).map(|(Width(columns), _)| columns.into());
    told.or_else(terminal).filter(|columns| *columns > 0)
}

/// The characters that `text` shows: without colours.
pub(crate) fn shown(text: &str) -> usize {
    let mut count = 0;
    let mut escape = false;
    for c in text.chars() {
        match (escape, c) {
            (false, '\x1b') => escape = true,
            (false, _) => count += 1,
            (true, 'm') => escape = false,
            (true, _) => {}
        }
    }
    count
}

/// `text` in lines of at most `width` columns, where its words allow: those are never broken. Lines
/// after the first begin with `indent`. Text that fits stays as it is, spaces and all.
pub(crate) fn wrap(text: &str, width: Option<usize>, indent: &str) -> String {
    let Some(width) = width.filter(|width| shown(text) > *width) else { return text.to_owned() };
    let lead: String = text.chars().take_while(|c| *c == ' ').collect();
    let (mut out, mut column) = (lead.clone(), lead.len());
    let mut empty = true;
    for word in text.split(' ').filter(|word| !word.is_empty()) {
        let length = shown(word);
        if !empty && column + 1 + length > width {
            out.push('\n');
            out.push_str(indent);
            column = shown(indent);
        } else if !empty {
            out.push(' ');
            column += 1;
        }
        out.push_str(word);
        column += length;
        empty = false;
    }
    out
}

/// Every line of `text`, wrapped; what follows stands as far in as its line does.
pub(crate) fn wrap_lines(text: &str, width: Option<usize>) -> String {
    let lines = text.lines().map(|line| {
        let lead = line.chars().take_while(|c| *c == ' ').count();
        wrap(line, width, &" ".repeat(lead))
    });
    lines.collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_break_between_words() {
        let text = "  one two three /a/path/that/is/longer";
        assert_eq!(wrap(text, Some(9), "    "), "  one two\n    three\n    /a/path/that/is/longer");
        assert_eq!(wrap(text, None, "  "), text);
        assert_eq!(wrap("a  b", Some(4), ""), "a  b", "what fits is left alone");
        assert_eq!(wrap_lines("  a b\nc d", Some(3)), "  a\n  b\nc d");
        assert_eq!(shown("\x1b[1;32mok\x1b[0m"), 2);
    }
}
