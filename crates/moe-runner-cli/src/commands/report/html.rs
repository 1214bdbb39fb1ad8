//! The little HTML that the page is made of. It is well-formed as XML, too.

/// Text as HTML has it; what moves cursors elsewhere is shown as unknown.
pub(super) fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            c if c.is_control() => out.push(char::REPLACEMENT_CHARACTER),
            // XML knows no such characters
            '\u{fffe}' | '\u{ffff}' => out.push(char::REPLACEMENT_CHARACTER),
            c => out.push(c),
        }
    }
    out
}

/// A paragraph of plain text.
pub(super) fn paragraph(text: &str) -> String {
    format!("<p>{}</p>\n", escape(text))
}

/// A picture with what there is to read from it.
pub(super) fn figure(svg: &str, caption: &str) -> String {
    format!("<figure>\n{svg}<figcaption>{}</figcaption>\n</figure>\n", escape(caption))
}

/// A table. Titles that begin with `>` head columns of numbers.
pub(super) fn table<R>(titles: &[&str], rows: impl IntoIterator<Item = R>) -> String
where
    R: IntoIterator<Item = String>,
{
    let class = |title: &str| if title.starts_with('>') { " class=\"n\"" } else { "" };
    let mut out = String::from("<table>\n<thead><tr>");
    for title in titles {
        out += &format!(
            "<th scope=\"col\"{}>{}</th>",
            class(title),
            escape(title.trim_start_matches('>'))
        );
    }
    out += "</tr></thead>\n<tbody>\n";
    for row in rows {
        out += "<tr>";
        for (cell, title) in row.into_iter().zip(titles) {
            out += &format!("<td{}>{}</td>", class(title), escape(&cell));
        }
        out += "</tr>\n";
    }
    out + "</tbody>\n</table>\n"
}

/// Names and what they stand for.
pub(super) fn facts<'a>(facts: impl IntoIterator<Item = (&'a str, String)>) -> String {
    let mut out = String::from("<dl>\n");
    for (name, text) in facts {
        let lines: Vec<String> = text.lines().map(escape).collect();
        let class = if lines.len() > 1 { " class=\"lines\"" } else { "" };
        out += &format!("<dt>{}</dt><dd{class}>{}</dd>\n", escape(name), lines.join("<br/>"));
    }
    out + "</dl>\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_from_outside_is_markup() {
        assert_eq!(escape("<a href=\"x\">&\x1b"), "&lt;a href=&quot;x&quot;&gt;&amp;\u{fffd}");
    }

    #[test]
    fn tables_have_a_cell_for_each_title() {
        let table = table(&["a", ">b"], [["x<".to_owned(), "1".to_owned()]]);
        assert!(table.contains("<th scope=\"col\">a</th><th scope=\"col\" class=\"n\">b</th>"));
        assert!(table.contains("<tr><td>x&lt;</td><td class=\"n\">1</td></tr>"), "{table}");
    }
}
