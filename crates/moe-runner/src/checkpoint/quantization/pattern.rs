//! Names and patterns of modules, in the ways that configurations write them.

use std::collections::{BTreeMap, HashMap};

use fancy_regex::Regex;

use crate::Result;
use crate::checkpoint::Config;
use crate::checkpoint::architecture::variants::STEMS;

/// Which modules something is said about.
#[derive(Clone, Debug)]
pub(super) enum Pattern {
    /// All.
    All,
    /// The one of this name.
    Name(String),
    /// The one of this name and those below it.
    Tree(String),
    /// Those with these components of a path in their names, one after the other.
    Components(String),
    /// Those of the routed experts.
    Experts,
    /// Those that the expression matches.
    Regex(Regex),
}

/// Which of several lists of patterns matches a module first. Configurations may name every module
/// of a model one by one, so that names are looked up, not gone through.
#[derive(Clone, Debug, Default)]
pub(super) struct Matcher {
    names: HashMap<String, usize>,
    trees: HashMap<String, usize>,
    /// By number of components.
    components: BTreeMap<usize, HashMap<String, usize>>,
    /// The first list that matches routed experts.
    experts: Option<usize>,
    /// With the number of their list, in order.
    expressions: Vec<(usize, Regex)>,
    /// The first list that matches everything.
    all: Option<usize>,
}

impl Matcher {
    pub(super) fn new(lists: impl IntoIterator<Item = Vec<Pattern>>) -> Self {
        let mut matcher = Self::default();
        for (list, patterns) in lists.into_iter().enumerate() {
            for pattern in patterns {
                match pattern {
                    Pattern::All => matcher.all = matcher.all.or(Some(list)),
                    Pattern::Experts => matcher.experts = matcher.experts.or(Some(list)),
                    Pattern::Name(name) => {
                        matcher.names.entry(any_stem_of(&name).unwrap_or(name)).or_insert(list);
                    }
                    Pattern::Tree(name) => {
                        matcher.trees.entry(any_stem_of(&name).unwrap_or(name)).or_insert(list);
                    }
                    Pattern::Components(path) => {
                        if let Some(tree) = any_stem_of(&path) {
                            matcher.trees.entry(tree).or_insert(list);
                            continue;
                        }
                        let count = path.split('.').count();
                        let same = matcher.components.entry(count).or_default();
                        same.entry(path.to_string()).or_insert(list);
                    }
                    Pattern::Regex(regex) => matcher.expressions.push((list, regex)),
                }
            }
        }
        matcher
    }

    /// The number of the first list that has a pattern for the full name `module`. An expression
    /// that cannot decide within its bounds on backtracking does not match.
    pub(super) fn first(&self, module: &str) -> Option<usize> {
        let layers = in_layers(module);
        let any_stem = format!("{ANY}{layers}");
        let parents = |name| parents(name).filter_map(|name| self.trees.get(name)).min();
        let experts = self.experts.filter(|_| module.contains(".experts"));
        let named = [
            parents(module).copied(),
            parents(&any_stem).copied(),
            self.names.get(module).copied(),
            self.names.get(&any_stem).copied(),
            self.with_components(module),
            experts,
            self.all,
        ];
        let named = named.into_iter().flatten().min();
        let bound = named.unwrap_or(usize::MAX);
        let mut expressions = self.expressions.iter().take_while(|(list, _)| *list < bound);
        let matches = |regex: &Regex| {
            let test = |name| regex.is_match(name).unwrap_or(false);
            test(module) || (layers.len() < module.len() && test(&any_stem))
        };
        let found = expressions.find(|(_, regex)| matches(regex));
        found.map(|(list, _)| *list).or(named)
    }

    /// The first list with components that stand in the name one after the other.
    fn with_components(&self, module: &str) -> Option<usize> {
        if self.components.is_empty() {
            return None;
        }
        let dots = module.match_indices('.').map(|(at, _)| at);
        let starts: Vec<usize> = std::iter::once(0).chain(dots.clone().map(|at| at + 1)).collect();
        let ends: Vec<usize> = dots.chain([module.len()]).collect();
        let lists = self.components.iter().flat_map(|(count, same)| {
            let runs = starts.iter().zip(ends.iter().skip(count - 1));
            runs.filter_map(move |(start, end)| same.get(&module[*start..*end]))
        });
        lists.copied().min()
    }
}

impl Pattern {
    /// A full name, or `re:` and an expression that must match from the name's start on (Python's
    /// `re.match`): compressed-tensors.
    pub(super) fn name_or_regex(config: &Config, key: &str, text: &str) -> Result<Self> {
        match text.strip_prefix("re:") {
            Some(expression) => Self::regex(config, key, expression),
            None => Ok(Self::Name(text.to_string())),
        }
    }

    /// An expression that must match from the name's start on.
    pub(super) fn regex(config: &Config, key: &str, expression: &str) -> Result<Self> {
        Self::compile(config, key, &format!("^(?:{expression})"), expression)
    }

    /// A name with `*`, `?` and `[…]` for the whole name (Python's `fnmatch`): ModelOpt, Quark. A
    /// name without them also covers the modules below it.
    pub(super) fn glob(config: &Config, key: &str, text: &str) -> Result<Self> {
        if !text.contains(['*', '?', '[']) {
            return Ok(Self::Tree(text.to_string()));
        }
        Self::compile(config, key, &format!("^(?:{})$", translate(text)), text)
    }

    /// One or several components of the name's path, `*` standing for anything: `mlp.gate` matches
    /// `model.layers.0.mlp.gate`, but not `model.layers.0.mlp.gate_proj`.
    pub(super) fn components(config: &Config, key: &str, text: &str) -> Result<Self> {
        if !text.contains(['*', '?', '[']) && !text.is_empty() {
            return Ok(Self::Components(text.to_string()));
        }
        Self::compile(config, key, &format!(r"(?:^|\.){}(?:\.|$)", translate(text)), text)
    }

    fn compile(config: &Config, key: &str, expression: &str, shown: &str) -> Result<Self> {
        let expression = any_stem(expression);
        Regex::new(&expression).map(Self::Regex).map_err(|error| {
            config.error(key, format!("has '{shown}', which is no usable pattern: {error}"))
        })
    }
}

/// Stands for any of the known beginnings of names.
const ANY: char = '*';

/// A name that begins with one of the known beginnings, with [`ANY`] in its place. (The shortest one
/// is none at all: a name that begins with `layers.` says so.)
fn any_stem_of(name: &str) -> Option<String> {
    let layers = in_layers(name);
    (layers.len() < name.len()).then(|| format!("{ANY}{layers}"))
}

/// A name with everything up to its layers cut off, where that is one of the known beginnings:
/// configurations name the modules of a model in memory, files may have other names for the same.
fn in_layers(name: &str) -> &str {
    let stems = STEMS.iter().filter(|stem| name.starts_with(**stem));
    let longest = stems.map(|stem| stem.len() - "layers.".len()).max();
    longest.map_or(name, |len| &name[len..])
}

/// An expression that begins with one of the known beginnings of names, for names that are cut off
/// by [`in_layers`] too.
fn any_stem(expression: &str) -> String {
    for stem in STEMS.iter().filter(|stem| stem.len() > "layers.".len()) {
        let escaped = fancy_regex::escape(&stem[..stem.len() - "layers.".len()]);
        for written in [escaped.as_ref(), &stem[..stem.len() - "layers.".len()]] {
            let rest = expression.strip_prefix("^(?:").and_then(|e| e.strip_prefix(written));
            if let Some(rest) = rest.filter(|rest| rest.starts_with("layers")) {
                return format!(r"^(?:(?:{written}|\*){rest}");
            }
        }
    }
    expression.to_string()
}

/// A name, and those of the modules that it stands in.
fn parents(name: &str) -> impl Iterator<Item = &str> {
    name.match_indices('.').map(|(end, _)| &name[..end]).chain([name])
}

/// The expression for a pattern of `fnmatch`.
fn translate(glob: &str) -> String {
    let mut expression = String::new();
    let mut rest = glob.chars();
    while let Some(c) = rest.next() {
        let set = rest.as_str().split_once(']').map(|(set, _)| set).filter(|set| !set.is_empty());
        match (c, set) {
            ('*', _) => expression.push_str(".*"),
            ('?', _) => expression.push('.'),
            ('[', Some(set)) => {
                let (not, set) = match set.strip_prefix('!') {
                    Some(set) => ("^", set),
                    None => ("", set),
                };
                let escaped = set.replace('\\', r"\\").replace('[', r"\[").replace('^', r"\^");
                expression.push_str(&format!("[{not}{escaped}]"));
                rest.by_ref().find(|c| *c == ']');
            }
            (c, _) => expression.push_str(&fancy_regex::escape(c.encode_utf8(&mut [0; 4]))),
        }
    }
    expression
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> Config {
        Config::new("config.json".as_ref(), serde_json::json!({}))
    }

    #[test]
    fn each_way_matches_what_its_origin_says() {
        let config = &config();
        let layer = "model.layers.12.mlp.";
        let cases: &[(Pattern, &str, bool)] = &[
            (Pattern::name_or_regex(config, "", "re:.*mlp.gate$").unwrap(), "gate", true),
            (Pattern::name_or_regex(config, "", "re:.*mlp.gate$").unwrap(), "gate_proj", false),
            (Pattern::name_or_regex(config, "", "re:mlp").unwrap(), "gate", false),
            // what the expressions of config files need and finite automata cannot do
            (Pattern::name_or_regex(config, "", "re:^(?!.*experts)").unwrap(), "gate", true),
            (Pattern::name_or_regex(config, "", "re:^(?!.*experts)").unwrap(), "experts.0", false),
            (Pattern::name_or_regex(config, "", "model.layers.12.mlp.gate").unwrap(), "gate", true),
            (Pattern::name_or_regex(config, "", "model.layers.12.mlp").unwrap(), "gate", false),
            (Pattern::glob(config, "", "model.layers.12.mlp").unwrap(), "gate", true),
            (Pattern::glob(config, "", "model.layers.12.mlp*").unwrap(), "gate", true),
            (Pattern::glob(config, "", "model.layers.1*.gate").unwrap(), "gate", true),
            (Pattern::glob(config, "", "model.layers.1?.mlp.gat[a-e]").unwrap(), "gate", true),
            (Pattern::glob(config, "", "model.layers.1?.mlp.gat[!a-e]").unwrap(), "gate", false),
            (Pattern::glob(config, "", "layers.12.mlp.gate").unwrap(), "gate", false),
            (Pattern::glob(config, "", "model_layers*").unwrap(), "gate", false),
            (Pattern::components(config, "", "mlp.gate").unwrap(), "gate", true),
            (Pattern::components(config, "", "mlp.gate").unwrap(), "gate_proj", false),
            (Pattern::components(config, "", "model.layers.*.mlp.router").unwrap(), "router", true),
            (Pattern::components(config, "", "lm_head").unwrap(), "gate", false),
        ];
        for (pattern, name, expected) in cases {
            let found = Matcher::new([vec![pattern.clone()]]).first(&format!("{layer}{name}"));
            assert_eq!(found, expected.then_some(0), "{pattern:?} {name}");
        }
    }

    #[test]
    fn the_first_list_counts_whatever_its_patterns_are() {
        let config = &config();
        let regex = |text| Pattern::regex(config, "", text).unwrap();
        let lists = [
            vec![regex(".*a.b$")],
            vec![Pattern::Tree("x.a".into()), Pattern::Name("x.a.b".into())],
            vec![Pattern::All],
            vec![regex(".*")],
        ];
        let matcher = Matcher::new(lists);
        for (module, first) in [("x.a.b", 0), ("x.a", 1), ("x.a.c.d", 1), ("x.ab", 2), ("y", 2)] {
            assert_eq!(matcher.first(module), Some(first), "{module}");
        }
        assert_eq!(Matcher::new([vec![Pattern::Name("x".into())]]).first("x.a"), None);
    }

    /// The model in memory and its files begin their names in different ways.
    #[test]
    fn beginnings_of_names_are_one_another() {
        let config = &config();
        let [memory, file] =
            ["model.language_model.layers.3.mlp", "language_model.model.layers.3.mlp"];
        for pattern in [
            Pattern::Name(memory.into()),
            Pattern::Tree(memory.into()),
            Pattern::glob(config, "", "model.language_model.layers.*.mlp").unwrap(),
            Pattern::regex(config, "", "model.language_model.layers.3.mlp").unwrap(),
            Pattern::components(config, "", memory).unwrap(),
            Pattern::name_or_regex(config, "", memory).unwrap(),
        ] {
            let matcher = Matcher::new([vec![pattern.clone()]]);
            for name in [memory, file, "model.layers.3.mlp"] {
                assert_eq!(matcher.first(name), Some(0), "{pattern:?} {name}");
            }
            assert_eq!(matcher.first("model.layers.4.mlp_other"), None, "{pattern:?}");
            assert_eq!(matcher.first("visual.layers.3.mlp"), None, "{pattern:?}");
        }
    }

    #[test]
    fn a_broken_expression_is_an_error_that_shows_it() {
        let error = Pattern::name_or_regex(&config(), "ignore", "re:(").unwrap_err().to_string();
        assert!(error.contains("'ignore': has '('"), "{error}");
    }
}
