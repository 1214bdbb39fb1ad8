//! Parts of the docs that are made from the code.

/// The part of `docs/checkpoints.md` of this title is `text`; with `UPDATE_DOCS=1` it is written.
pub(crate) fn expect(title: &str, text: &str) {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/checkpoints.md");
    let page = std::fs::read_to_string(path).unwrap();
    let (start, end) =
        (format!("<!-- {title}, made by a test -->\n"), format!("<!-- end of {title} -->\n"));
    let (before, rest) = page.split_once(&start).unwrap();
    let (_, after) = rest.split_once(&end).unwrap();
    let wanted = format!("{before}{start}{text}{end}{after}");
    if page != wanted && std::env::var_os("UPDATE_DOCS").is_some() {
        return std::fs::write(path, &wanted).unwrap();
    }
    assert_eq!(page, wanted, "set UPDATE_DOCS=1 to write it anew");
}
