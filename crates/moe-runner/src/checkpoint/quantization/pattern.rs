//! Names and patterns of modules, in the ways that configurations write them.

use std::collections::HashMap;

use fancy_regex::Regex;

use crate::Result;
use crate::checkpoint::Config;

/// Which modules something is said about.
#[derive(Clone, Debug)]
pub(super) enum Pattern {
    /// All.
    All,
    /// The one of this name.
    Name(String),
    /// The one of this name and those below it.
    Tree(String),
    /// Those that the expression matches.
    Regex(Regex),
}

/// Which of several lists of patterns matches a module first. Configurations may name every module
/// of a model one by one, so that names are looked up, not gone through.
#[derive(Clone, Debug, Default)]
pub(super) struct Matcher {
    names: HashMap<String, usize>,
    trees: HashMap<String, usize>,
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
                    Pattern::Name(name) => {
                        matcher.names.entry(name).or_insert(list);
                    }
                    Pattern::Tree(name) => {
                        matcher.trees.entry(name).or_insert(list);
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
        let parents = module.match_indices('.').map(|(end, _)| &module[..end]);
        let trees = parents.chain([module]).filter_map(|name| self.trees.get(name));
        let named = trees.chain(self.names.get(module)).copied().chain(self.all).min();
        let bound = named.unwrap_or(usize::MAX);
        let mut expressions = self.expressions.iter().take_while(|(list, _)| *list < bound);
        let found = expressions.find(|(_, regex)| regex.is_match(module).unwrap_or(false));
        found.map(|(list, _)| *list).or(named)
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
        Self::compile(config, key, &format!(r"(?:^|\.){}(?:\.|$)", translate(text)), text)
    }

    fn compile(config: &Config, key: &str, expression: &str, shown: &str) -> Result<Self> {
        Regex::new(expression).map(Self::Regex).map_err(|error| {
            config.error(key, format!("has '{shown}', which is no usable pattern: {error}"))
        })
    }
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

    #[test]
    fn a_broken_expression_is_an_error_that_shows_it() {
        let error = Pattern::name_or_regex(&config(), "ignore", "re:(").unwrap_err().to_string();
        assert!(error.contains("'ignore': has '('"), "{error}");
    }
}
