//! `docs/acid.md` says what the readings beside it say: its matrix is made of `docs/acid-readings.jsonl`
//! here. `ACID_PAGE=write cargo test -p moe-acid --test page` writes it.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;

use moe_acid::write::Form;
use moe_acid::{Block, Decoder, FAMILIES, Family, Readings, ReadingsFile};
use serde::Deserialize;

/// One line: what an engine said of one checkpoint, or that it refused.
#[derive(Deserialize)]
struct Line {
    /// A column of the page.
    engine: String,
    family: String,
    forms: Vec<String>,
    /// What was run.
    command: String,
    /// The fault that was put in, and the beginning of the verdict that it must have.
    control: Option<[String; 2]>,
    /// What the engine said in place of numbers.
    refused: Option<String>,
    #[serde(default)]
    log_probabilities: Vec<Vec<Option<f64>>>,
}

#[derive(Default)]
struct Column {
    /// By family and verdict, the forms.
    cells: BTreeMap<(usize, String), Vec<String>>,
    commands: Vec<String>,
    controls: Vec<String>,
}

fn family(name: &str) -> usize {
    FAMILIES.iter().position(|family| family.name == name).unwrap()
}

#[test]
fn the_page_is_what_the_readings_say() {
    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs");
    let page = std::fs::read_to_string(docs.join("acid.md")).unwrap();
    let lines = std::fs::read_to_string(docs.join("acid-readings.jsonl")).unwrap();
    let matrix = matrix(&lines);
    let (begin, end) = ("<!-- readings -->\n", "<!-- end -->\n");
    let (head, rest) = page.split_once(begin).unwrap();
    let (_, tail) = rest.split_once(end).unwrap();
    let made = format!("{head}{begin}{matrix}{end}{tail}");
    if std::env::var("ACID_PAGE").is_ok_and(|what| what == "write") {
        std::fs::write(docs.join("acid.md"), &made).unwrap();
    } else {
        assert_eq!(page, made, "ACID_PAGE=write cargo test -p moe-acid --test page");
    }
}

fn matrix(lines: &str) -> String {
    let blocks: Vec<Block> =
        FAMILIES.iter().map(|family: &'static Family| Block::new(family)).collect();
    let decoders: Vec<Decoder<'_>> = blocks.iter().map(Decoder::new).collect();
    let mut columns: BTreeMap<String, Column> = BTreeMap::new();
    for line in lines.lines() {
        let line: Line = serde_json::from_str(line).unwrap();
        let at = family(&line.family);
        let column = columns.entry(line.engine.clone()).or_default();
        let verdict = match &line.refused {
            Some(words) => format!("refused: {words}"),
            None => {
                let file = ReadingsFile {
                    family: line.family.clone(),
                    engine: line.engine.clone(),
                    log_probabilities: line.log_probabilities,
                };
                let (_, readings): (_, Readings) = file.read().unwrap();
                let verdict = decoders[at].verdict(&readings);
                if let Some([fault, wanted]) = &line.control {
                    let said = verdict.to_string();
                    assert!(said.starts_with(wanted), "{}, {fault}: {said}", line.engine);
                    column.controls.push(format!("{fault} ({}): *{said}*", line.family));
                    continue;
                }
                let notes: Vec<String> = verdict.notes.iter().map(ToString::to_string).collect();
                match notes.is_empty() {
                    true => verdict.to_string(),
                    false => format!("{verdict} ({})", notes.join("; ")),
                }
            }
        };
        if !column.commands.contains(&line.command) {
            column.commands.push(line.command);
        }
        column.cells.entry((at, verdict)).or_default().extend(line.forms);
    }
    let mut text = String::new();
    for (engine, column) in &mut columns {
        let cells = column.cells.values().map(Vec::len).sum::<usize>();
        assert!(!column.controls.is_empty(), "{engine}: a column without a negative control");
        for (at, family) in FAMILIES.iter().enumerate() {
            let asked: Vec<&String> =
                column.cells.iter().filter(|cell| cell.0.0 == at).flat_map(|cell| cell.1).collect();
            let forms = Form::ALL.iter().filter(|form| form.refuses(family).is_none());
            let forms: Vec<&str> = forms.map(|form| form.name()).collect();
            let rest: Vec<&str> =
                forms.into_iter().filter(|form| !asked.iter().any(|asked| asked == form)).collect();
            if !rest.is_empty() {
                let rest = rest.into_iter().map(String::from).collect();
                column.cells.insert((at, "not run".into()), rest);
            }
        }
        writeln!(text, "\n### {engine}\n\n{cells} checkpoints; again with").unwrap();
        column.commands.iter().for_each(|command| writeln!(text, "`{command}`").unwrap());
        writeln!(text, "\n| architecture | forms | verdict |\n|---|---|---|").unwrap();
        for ((at, verdict), forms) in &column.cells {
            writeln!(text, "| {} | {} | {verdict} |", FAMILIES[*at].name, forms.join(", "))
                .unwrap();
        }
        writeln!(text, "\nNegative controls, each named: {}.", column.controls.join("; ")).unwrap();
    }
    text
}
