//! Slurm's compact lists.

/// The most hosts a list may stand for. Larger ones are mistakes, and would only cost memory.
const MAX_HOSTS: usize = 1 << 16;

/// The most brackets of a name, and the most digits of a number in them.
const MAX_BRACKETS: usize = 8;
const MAX_DIGITS: usize = 20;

/// The hosts that a list such as `gpu[03-05,9],login1` stands for, in its order. A name may have several brackets, of
/// which the last varies fastest; numbers keep the leading zeros of a range's first one.
///
/// # Errors
/// The list is malformed or stands for more than 65536 hosts; the reason.
pub fn expand_hosts(list: &str) -> Result<Vec<String>, String> {
    let mut hosts = Vec::new();
    let mut rest = list.trim();
    while !rest.is_empty() {
        let (name, tail) = split_name(rest)?;
        if name.matches('[').count() > MAX_BRACKETS {
            return Err(format!("more than {MAX_BRACKETS} brackets in a name"));
        }
        hosts.extend(expand_name(name)?);
        if hosts.len() > MAX_HOSTS {
            return Err(format!("more than {MAX_HOSTS} hosts"));
        }
        rest = tail;
    }
    if hosts.is_empty() { Err("no host".into()) } else { Ok(hosts) }
}

/// The first name of `list`, brackets and all, and what follows its comma.
fn split_name(list: &str) -> Result<(&str, &str), String> {
    let mut is_inside = false;
    for (at, character) in list.char_indices() {
        match character {
            '[' if is_inside => return Err("a bracket within brackets".into()),
            ']' if !is_inside => return Err("a bracket closes that was not opened".into()),
            '[' => is_inside = true,
            ']' => is_inside = false,
            ',' if !is_inside && at == 0 => return Err("an empty name".into()),
            ',' if !is_inside => return Ok((&list[..at], &list[at + 1..])),
            _ => {}
        }
    }
    if is_inside { Err("a bracket is not closed".into()) } else { Ok((list, "")) }
}

/// The hosts that one name stands for.
fn expand_name(name: &str) -> Result<Vec<String>, String> {
    let Some((before, rest)) = name.split_once('[') else {
        return Ok(vec![name.into()]);
    };
    let (ranges, after) = rest.split_once(']').ok_or("a bracket is not closed")?;
    let tails = expand_name(after)?;
    let mut hosts = Vec::new();
    for range in ranges.split(',') {
        let (first, last, width) = parse_range(range)?;
        let count = (last - first).saturating_add(1).saturating_mul(tails.len() as u64);
        if hosts.len() as u64 + count.min(1 << 32) > MAX_HOSTS as u64 {
            return Err(format!("more than {MAX_HOSTS} hosts"));
        }
        let numbered = |n| tails.iter().map(move |tail| format!("{before}{n:0width$}{tail}"));
        hosts.extend((first..=last).flat_map(numbered));
    }
    Ok(hosts)
}

/// First, last and width of `03-05` or `9`.
fn parse_range(range: &str) -> Result<(u64, u64, usize), String> {
    let (first, last) = range.split_once('-').unwrap_or((range, range));
    let number = |text: &str| match text.len() {
        ..=MAX_DIGITS => text.parse().map_err(|_| format!("{text:?} is not a number")),
        _ => Err("a number has too many digits".into()),
    };
    let (low, high): (u64, u64) = (number(first)?, number(last)?);
    if low > high { Err(format!("{range} runs backwards")) } else { Ok((low, high, first.len())) }
}

/// The entry for `node` in a list such as `2(x4),1`: four nodes of two tasks, then one of one.
///
/// # Errors
/// The list is malformed or has no such node; the reason.
pub fn tasks_of_node(list: &str, node: usize) -> Result<usize, String> {
    let mut nodes = 0usize;
    for entry in list.trim().split(',') {
        let (tasks, times) = match entry.split_once("(x") {
            Some((tasks, times)) => (tasks, times.strip_suffix(')').ok_or("a parenthesis is not closed")?),
            None => (entry, "1"),
        };
        let number = |text: &str| text.parse::<usize>().map_err(|_| format!("{text:?} is not a number"));
        let tasks = number(tasks)?;
        nodes = nodes.saturating_add(number(times)?);
        if node < nodes {
            return Ok(tasks);
        }
    }
    Err(format!("it has {nodes} nodes, not node {node}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_expand_in_order() {
        for (list, hosts) in [
            ("login1", "login1"),
            ("gpu[03-05,9],login1", "gpu03 gpu04 gpu05 gpu9 login1"),
            ("a,b-c,d.example.org", "a b-c d.example.org"),
            ("n[8-11]", "n8 n9 n10 n11"),
            ("n[098-101]", "n098 n099 n100 n101"),
            ("rack[1-2]n[0,07]-ib", "rack1n0-ib rack1n07-ib rack2n0-ib rack2n07-ib"),
            ("[1-2]", "1 2"),
            (" n0 ", "n0"),
        ] {
            assert_eq!(expand_hosts(list).unwrap().join(" "), hosts, "{list}");
        }
    }

    #[test]
    fn malformed_host_lists_are_refused() {
        for list in [
            "",
            "n[1",
            "n1]",
            "n[1-[2]]",
            "n[2-1]",
            "n[a-b]",
            "n[]",
            "n[1-]",
            "n[-1]",
            ",n",
            "n[0-18446744073709551615]",
            "n[0-99999],m",
            "n[0-999]m[0-999]",
            "n[99999999999999999999]",
            "n[000000000000000000001]",
            "n[1][1][1][1][1][1][1][1][1]",
        ] {
            assert!(expand_hosts(list).is_err(), "{list}");
        }
    }

    #[test]
    fn tasks_per_node_count_runs() {
        let at = |list: &str| (0..6).map(|node| tasks_of_node(list, node).ok()).collect::<Vec<_>>();
        assert_eq!(at("2(x4)"), [Some(2), Some(2), Some(2), Some(2), None, None]);
        assert_eq!(at("2(x2),1,4(x3)"), [Some(2), Some(2), Some(1), Some(4), Some(4), Some(4)]);
        assert_eq!(at("8"), [Some(8), None, None, None, None, None]);
        for list in ["", "x", "2(x", "2(x4", "2(y4)", "2(x-1)"] {
            assert!(tasks_of_node(list, 0).is_err(), "{list}");
        }
        assert_eq!(tasks_of_node("1(x18446744073709551615),2", 7), Ok(1));
    }
}
