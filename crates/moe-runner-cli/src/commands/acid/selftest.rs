//! `acid self`: the proof that mistakes are named.

use std::collections::BTreeSet;

use anyhow::Result;
use moe_acid::{Block, Decoder, FAMILIES, Mistake, Readings};
use serde::Serialize;

use crate::report::Report;
use crate::report::table::Columns;

#[derive(Serialize)]
struct SelfJson {
    ok: bool,
    mistakes: usize,
    named: usize,
    checkpoints: Vec<FamilyJson>,
}

#[derive(Serialize)]
struct FamilyJson {
    family: &'static str,
    mistakes: usize,
    /// Mistakes that are called something else.
    unnamed: Vec<String>,
    /// Mistakes that cannot be told apart.
    classes: Vec<[&'static str; 2]>,
    /// A right block is called right.
    right: bool,
}

pub(super) fn run() -> Result<Report> {
    let checkpoints: Vec<FamilyJson> = FAMILIES
        .iter()
        .map(|family| {
            let block = Block::new(family);
            let decoder = Decoder::new(&block);
            let seen = |mistakes: BTreeSet<Mistake>| {
                let [routed, shared] = block.simulate(&mistakes);
                let rows = routed.iter().zip(&shared);
                let sum =
                    |(r, s): (&Vec<f64>, &Vec<f64>)| r.iter().zip(s).map(|(r, s)| r + s).collect();
                decoder.verdict(&Readings(rows.map(sum).collect()))
            };
            let mut json = FamilyJson {
                family: family.name,
                mistakes: 0,
                unnamed: Vec::new(),
                classes: Vec::new(),
                right: seen(BTreeSet::new()).is_right(),
            };
            for mistake in Mistake::of(family) {
                json.mistakes += 1;
                let class = decoder.class_of(mistake);
                let others = class.iter().flatten().filter(|other| **other > mistake);
                json.classes.extend(others.map(|other| [mistake.words(), other.words()]));
                let verdict = seen(BTreeSet::from([mistake]));
                let named = |one: &Mistake| *one == mistake || class.contains(&Some(*one));
                if verdict.mistakes.len() != 1 || !verdict.mistakes.iter().all(named) {
                    json.unnamed.push(format!("{mistake}: called '{verdict}'"));
                }
            }
            json
        })
        .collect();
    let mistakes: usize = checkpoints.iter().map(|one| one.mistakes).sum();
    let named = mistakes - checkpoints.iter().map(|one| one.unnamed.len()).sum::<usize>();
    let ok = named == mistakes && checkpoints.iter().all(|one| one.right);
    let mut table = Columns::new(&["checkpoint", "right is right", ">mistakes", ">named"]);
    for one in &checkpoints {
        let right = if one.right { "yes" } else { "NO" };
        let named = one.mistakes - one.unnamed.len();
        table.row([one.family.into(), right.into(), one.mistakes.to_string(), named.to_string()]);
    }
    let mut text = table.to_string();
    for one in &checkpoints {
        one.unnamed.iter().for_each(|line| text += &format!("{}: {line}\n", one.family));
        for [a, b] in &one.classes {
            text += &format!("{}: '{a}' and '{b}' have the same readings\n", one.family);
        }
    }
    text += &format!("{named} of {mistakes} mistakes are named\n");
    Report::new(ok, text, &SelfJson { ok, mistakes, named, checkpoints })
}
