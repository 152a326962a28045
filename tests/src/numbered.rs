//! Numbered output: what a chatty process prints, and whether what arrived is that, byte for byte.
//!
//! Line n of a stream is `<tag>:<n> ` a thousand times over, so that each byte of it belongs to one place of one
//! stream; the last line is `end <number of lines>`. A byte lost, doubled or swapped anywhere, or one of another
//! stream, is a difference, and so is a tail that is missing.

/// Names in one line.
const NAMES: usize = 1024;

/// Prints numbered lines until it is terminated or has printed enough, then ends. Its arguments: the tag, the exit
/// code, the pause between two lines in seconds, the number of lines, and the tag of the lines that it prints on
/// standard error meanwhile, empty for none. It forks nothing while it runs, as the counter of the demo image.
const CHATTY: &str = r#"tag=$1 code=$2 pause=$3 last=$4 errors=$5
mkfifo /tmp/tick.$$ || exit 125
exec 9<>/tmp/tick.$$
rm /tmp/tick.$$
trap 'over=1' TERM
n=0
while [ -z "$over" ] && [ "$n" -lt "$last" ]; do
    n=$((n + 1))
    u="$tag:$n " && u="$u$u$u$u" && u="$u$u$u$u" && u="$u$u$u$u" && u="$u$u$u$u" && u="$u$u$u$u"
    echo "$u"
    if [ -n "$errors" ]; then
        u="$errors:$n " && u="$u$u$u$u" && u="$u$u$u$u" && u="$u$u$u$u" && u="$u$u$u$u" && u="$u$u$u$u"
        echo "$u" >&2
    fi
    read -r -t "$pause" -u 9 nothing
done
echo "end $n"
[ -z "$errors" ] || echo "end $n" >&2
exit "$code"
"#;

/// A chatty process.
#[derive(Clone, Debug)]
pub struct Chatty {
    /// Of its lines on standard output. No tag begins with `e`.
    pub tag: String,
    /// Of its lines on standard error; empty: none.
    pub errors: String,
    /// Its exit code.
    pub code: u32,
    /// Between two lines, milliseconds.
    pub pause_ms: u32,
    /// How many it prints unless it is terminated before.
    pub lines: u64,
    /// Run first, as a line of shell.
    pub before: String,
}

impl Chatty {
    /// More lines than a test lives to see.
    pub const ENDLESS: u64 = 2_000_000_000;

    /// Its command line.
    pub fn args(&self) -> Vec<String> {
        let script = format!("{}\n{CHATTY}", self.before);
        let pause = format!("{}.{:03}", self.pause_ms / 1000, self.pause_ms % 1000);
        [
            "sh",
            "-c",
            &script,
            "chatty",
            &self.tag,
            &self.code.to_string(),
            &pause,
            &self.lines.to_string(),
            &self.errors,
        ]
        .map(str::to_owned)
        .to_vec()
    }
}

/// Line `number` (from 1), its end included.
pub fn line(tag: &str, number: u64, end: &str) -> Vec<u8> {
    let mut line = format!("{tag}:{number} ").repeat(NAMES).into_bytes();
    line.extend(end.as_bytes());
    line
}

/// The last line after `lines` numbered ones.
pub fn last_line(lines: u64, end: &str) -> Vec<u8> {
    format!("end {lines}{end}").into_bytes()
}

/// Compares a stream with what it must be, as it comes.
#[derive(Clone, Debug)]
pub struct Checker {
    tag: String,
    end: &'static str,
    line: u64,
    expected: Vec<u8>,
    at: usize,
    ended: bool,
    bytes: u64,
    damage: Option<String>,
}

impl Checker {
    /// Of a stream from its first byte; `end` is how a line ends.
    pub fn new(tag: &str, end: &'static str) -> Checker {
        Checker {
            tag: tag.to_owned(),
            end,
            line: 0,
            expected: Vec::new(),
            at: 0,
            ended: false,
            bytes: 0,
            damage: None,
        }
    }

    /// Takes what came next. After the first difference it only counts.
    pub fn take(&mut self, mut bytes: &[u8]) {
        let before = self.bytes;
        self.bytes += u64::try_from(bytes.len()).unwrap_or(0);
        let all = bytes;
        while !bytes.is_empty() && self.damage.is_none() {
            if self.at == self.expected.len() {
                self.next_line(bytes[0]);
            }
            let rest = &self.expected[self.at..];
            let same = rest.iter().zip(bytes).take_while(|(want, got)| want == got).count();
            self.at += same;
            if rest.is_empty() || same < rest.len().min(bytes.len()) {
                let offset = all.len() - bytes.len() + same;
                let show = |bytes: &[u8]| {
                    String::from_utf8_lossy(&bytes[..bytes.len().min(48)]).escape_debug().to_string()
                };
                let place = before + u64::try_from(offset).unwrap_or(0);
                self.damage = Some(format!(
                    "byte {place}, byte {} of line {}: expected `{}`, got `{}`, after `{}`",
                    self.at,
                    self.line,
                    show(&rest[same..]),
                    show(&all[offset..]),
                    show(&all[offset.saturating_sub(24)..offset]),
                ));
            }
            bytes = &bytes[same..];
        }
    }

    fn next_line(&mut self, first: u8) {
        self.at = 0;
        if self.ended {
            self.expected.clear();
        } else if first == b'e' {
            self.ended = true;
            self.expected = last_line(self.line, self.end);
        } else {
            self.line += 1;
            self.expected = line(&self.tag, self.line, self.end);
        }
    }

    /// How many bytes came.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// How many numbered lines began.
    pub fn lines(&self) -> u64 {
        self.line
    }

    /// The first difference, in words.
    pub fn damage(&self) -> Option<&str> {
        self.damage.as_deref()
    }

    /// Nothing differs, and the last line is complete.
    pub fn is_whole(&self) -> bool {
        self.damage.is_none() && self.ended && self.at == self.expected.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stream(lines: u64) -> Vec<u8> {
        let mut all: Vec<u8> = (1..=lines).flat_map(|number| line("a", number, "\n")).collect();
        all.extend(last_line(lines, "\n"));
        all
    }

    fn checked<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> Checker {
        let mut checker = Checker::new("a", "\n");
        parts.into_iter().for_each(|part| checker.take(part));
        checker
    }

    #[test]
    fn a_whole_stream_in_any_pieces_is_whole() {
        let all = stream(12);
        for size in [1, 7, 4096, all.len()] {
            let checker = checked(all.chunks(size));
            assert!(checker.is_whole(), "{:?}", checker.damage());
            assert_eq!((checker.lines(), checker.bytes()), (12, all.len() as u64));
        }
    }

    #[test]
    fn a_lost_a_doubled_a_swapped_and_a_missing_byte_are_seen() {
        let all = stream(12);
        for at in [0, 5, 4999, 20_000, all.len() - 2] {
            let lost: Vec<u8> = all.iter().enumerate().filter(|(i, _)| *i != at).map(|(_, b)| *b).collect();
            assert!(!checked([lost.as_slice()]).is_whole(), "lost {at}");
            let doubled = [&all[..=at], &all[at..]];
            assert!(!checked(doubled).is_whole(), "doubled {at}");
        }
        let mut swapped = all.clone();
        swapped.swap(4999, 5000);
        assert!(checked([swapped.as_slice()]).damage().is_some());
        let missing = checked([&all[..all.len() - 1]]);
        assert!(missing.damage().is_none() && !missing.is_whole());
        let more = checked([all.as_slice(), b"\n"]);
        assert!(more.damage().is_some(), "a byte after the end");
    }

    #[test]
    fn a_whole_line_that_is_lost_or_doubled_is_named() {
        let (one, two, three) = (line("a", 1, "\n"), line("a", 2, "\n"), line("a", 3, "\n"));
        let lost = checked([one.as_slice(), &three]);
        assert!(
            lost.damage().is_some_and(|text| text.contains("line 2") && text.contains("a:2")),
            "{lost:?}"
        );
        assert!(checked([one.as_slice(), &two, &two]).damage().is_some());
    }
}
