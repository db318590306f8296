//! Tells code from comments and strings in a Rust file. Called by the rules; understands no more
//! of the language than that, and never fails: a file that ends in a string is a string to its end.

/// A Rust file, line by line.
#[derive(Clone, Debug)]
pub(crate) struct Source {
    /// The lines.
    pub(crate) lines: Vec<Line>,
}

/// One line, taken apart.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Line {
    /// As it is.
    pub(crate) raw: String,
    /// Its code; what strings and characters hold is left out, their quotes stay.
    pub(crate) code: String,
    /// What its comments say, with their marks (`//`, `///`, `//!`, `/*`).
    pub(crate) comment: String,
    /// Whether it belongs to tests: the file's test module comes last.
    pub(crate) in_tests: bool,
}

/// Where the lexer stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Code,
    LineComment,
    /// Block comments nest.
    BlockComment(u32),
    /// A string; whether `\` escapes.
    Text,
    /// A raw string with that many `#`.
    RawText(usize),
}

impl Source {
    /// Takes a file apart.
    pub(crate) fn read(text: &str) -> Self {
        let mut lines = Vec::new();
        let mut state = State::Code;
        let mut in_tests = false;
        for raw in text.lines() {
            let mut line = Line {
                raw: raw.to_owned(),
                ..Line::default()
            };
            state = read_line(raw, state, &mut line);
            if state == State::LineComment {
                state = State::Code;
            }
            in_tests |= line.code.trim_start().starts_with("#[cfg(test)]")
                || line.code.trim_start().starts_with("#![cfg(test)]");
            line.in_tests = in_tests;
            lines.push(line);
        }
        Self { lines }
    }

    /// Lines with their numbers from 1.
    pub(crate) fn numbered(&self) -> impl Iterator<Item = (usize, &Line)> {
        (1..).zip(&self.lines)
    }
}

/// Reads one line from `state` and returns the state at its end.
fn read_line(raw: &str, mut state: State, line: &mut Line) -> State {
    let chars: Vec<char> = raw.chars().collect();
    let mut at = 0;
    while at < chars.len() {
        let rest = chars.get(at..).unwrap_or_default();
        let (next, taken) = match state {
            State::Code => in_code(rest, &mut line.code, &mut line.comment),
            State::LineComment => {
                line.comment.extend(rest);
                (State::LineComment, rest.len())
            }
            State::BlockComment(depth) => in_block_comment(rest, depth, &mut line.comment),
            State::Text => in_text(rest, &mut line.code),
            State::RawText(hashes) => in_raw_text(rest, hashes, &mut line.code),
        };
        state = next;
        at += taken.max(1);
    }
    state
}

fn in_code(rest: &[char], code: &mut String, comment: &mut String) -> (State, usize) {
    if rest.starts_with(&['/', '/']) {
        comment.push_str("//");
        return (State::LineComment, 2);
    }
    if rest.starts_with(&['/', '*']) {
        comment.push_str("/*");
        return (State::BlockComment(1), 2);
    }
    if let Some((hashes, taken)) = raw_text_start(rest, code) {
        code.push('"');
        return (State::RawText(hashes), taken);
    }
    match rest {
        ['"', ..] => {
            code.push('"');
            (State::Text, 1)
        }
        ['\'', '\\', ..] => {
            // An escaped character: to the closing quote, which is not the escaped one.
            let end = rest
                .iter()
                .skip(3)
                .position(|c| *c == '\'')
                .map_or(rest.len(), |at| at + 4);
            code.push_str("''");
            (State::Code, end)
        }
        ['\'', _, '\'', ..] => {
            code.push_str("''");
            (State::Code, 3)
        }
        [other, ..] => {
            code.push(*other);
            (State::Code, 1)
        }
        [] => (State::Code, 1),
    }
}

/// The number of `#` and the length of `r#"`, `br"` and the like, unless `r` ends a name.
fn raw_text_start(rest: &[char], before: &str) -> Option<(usize, usize)> {
    let in_name = |c: char| c.is_alphanumeric() || c == '_';
    if before.chars().next_back().is_some_and(in_name) {
        return None;
    }
    let prefix = match rest {
        ['r', ..] => 1,
        ['b' | 'c', 'r', ..] => 2,
        _ => return None,
    };
    let hashes = rest.iter().skip(prefix).take_while(|c| **c == '#').count();
    (rest.get(prefix + hashes) == Some(&'"')).then_some((hashes, prefix + hashes + 1))
}

fn in_block_comment(rest: &[char], depth: u32, comment: &mut String) -> (State, usize) {
    if rest.starts_with(&['*', '/']) {
        let state = if depth == 1 {
            State::Code
        } else {
            State::BlockComment(depth - 1)
        };
        return (state, 2);
    }
    if rest.starts_with(&['/', '*']) {
        return (State::BlockComment(depth + 1), 2);
    }
    comment.extend(rest.first());
    (State::BlockComment(depth), 1)
}

fn in_text(rest: &[char], code: &mut String) -> (State, usize) {
    match rest {
        ['\\', ..] => (State::Text, 2),
        ['"', ..] => {
            code.push('"');
            (State::Code, 1)
        }
        _ => (State::Text, 1),
    }
}

fn in_raw_text(rest: &[char], hashes: usize, code: &mut String) -> (State, usize) {
    let closes = rest.first() == Some(&'"')
        && rest.iter().skip(1).take_while(|c| **c == '#').count() >= hashes;
    if closes {
        code.push('"');
        return (State::Code, 1 + hashes);
    }
    (State::RawText(hashes), 1)
}

#[cfg(test)]
mod tests {
    use super::Source;

    fn code(text: &str) -> Vec<String> {
        Source::read(text)
            .lines
            .into_iter()
            .map(|line| line.code)
            .collect()
    }

    fn comments(text: &str) -> Vec<String> {
        Source::read(text)
            .lines
            .into_iter()
            .map(|line| line.comment)
            .collect()
    }

    #[test]
    fn comments_are_no_code_and_code_is_no_comment() {
        assert_eq!(
            code("let a = 1; // unsafe\n/* x */ let b;"),
            ["let a = 1; ", " let b;"]
        );
        assert_eq!(comments("let a = 1; // unsafe"), ["// unsafe"]);
    }

    #[test]
    fn what_a_string_holds_is_neither() {
        assert_eq!(
            code(r#"f("unsafe // \" x", 'a', '"', '\'', b"y");"#),
            [r#"f("", '', '', '', b"");"#]
        );
        assert_eq!(comments(r#"f("// no comment");"#), [""]);
    }

    #[test]
    fn raw_strings_end_at_their_own_quotes() {
        assert_eq!(
            code(r##"f(r#"a " // b"#, br"\", bar"x");"##),
            [r#"f("", "", bar"");"#]
        );
    }

    #[test]
    fn strings_and_block_comments_go_over_lines() {
        let text = "let a = \"one\n// two\nthree\"; x\n/* a /* b */\nstill */ y";
        assert_eq!(code(text), ["let a = \"", "", "\"; x", "", " y"]);
    }

    #[test]
    fn a_lifetime_is_no_character() {
        assert_eq!(
            code("fn f<'a>(x: &'a str) -> &'static str { \"s\" }")[0],
            "fn f<'a>(x: &'a str) -> &'static str { \"\" }"
        );
    }

    #[test]
    fn everything_from_the_test_module_on_is_test() {
        let source = Source::read("fn a() {}\n#[cfg(test)]\nmod tests {\n}\n");
        let in_tests: Vec<bool> = source.lines.iter().map(|line| line.in_tests).collect();
        assert_eq!(in_tests, [false, true, true, true]);
    }
}
