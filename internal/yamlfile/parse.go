package yamlfile

import (
	"fmt"
	"unicode/utf8"

	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/lexer"
	"github.com/goccy/go-yaml/parser"
	"github.com/goccy/go-yaml/token"
)

// Bounds on nesting. The parser recurses, so a megabyte of "[" would end the process, not just the parse.
const (
	maxFlowDepth   = 64  // of [ and {
	maxBlockColumn = 512 // of a "-" or "?" in block style; every level of nesting begins further right
)

// parse gives the root of the one document in data.
func parse(data []byte) (ast.Node, *fault) {
	if len(data) > MaxSize {
		return nil, &fault{
			message: fmt.Sprintf("the file has %d bytes, more than the %d that are read", len(data), MaxSize),
			next:    "split it or remove what is not needed",
		}
	}
	if !utf8.Valid(data) {
		return nil, &fault{message: "the file is not valid UTF-8", next: "save it as UTF-8"}
	}
	tokens := rejoin(lexer.Tokenize(string(data)))
	if f := screen(tokens); f != nil {
		return nil, f
	}
	tree, err := parser.Parse(tokens, 0, parser.AllowDuplicateMapKey()) // checker finds those, all of them
	if err != nil {
		return nil, faultOf(err, nil)
	}
	if len(tree.Docs) == 0 || tree.Docs[0].Body == nil {
		return nil, &fault{message: "the file is empty", next: "write at least one key"}
	}
	if len(tree.Docs) > 1 {
		return nil, secondDocument(tree.Docs[1].GetToken())
	}
	return tree.Docs[0].Body, nil
}

// rejoin undoes a fault of the lexer: within { }, it takes the second colon of [tls://host:4222] for a mapping's. In a list,
// a colon that touches the texts on both its sides belongs to them (YAML 1.2.2, section 7.3.3).
func rejoin(tokens token.Tokens) token.Tokens {
	var open []token.Type
	joined := make(token.Tokens, 0, len(tokens))
	for i := 0; i < len(tokens); i++ {
		tk := tokens[i]
		switch tk.Type {
		case token.SequenceStartType, token.MappingStartType:
			open = append(open, tk.Type)
		case token.SequenceEndType, token.MappingEndType:
			open = open[:max(0, len(open)-1)]
		}
		if len(open) > 0 && open[len(open)-1] == token.SequenceStartType {
			for i+2 < len(tokens) && tokens[i+1].Type == token.MappingValueType && touches(tk, tokens[i+1]) && touches(tokens[i+1], tokens[i+2]) {
				tk = token.String(tk.Value+":"+tokens[i+2].Value, tk.Origin+":"+tokens[i+2].Origin, tk.Position)
				i += 2
			}
		}
		joined.Add(tk)
	}
	return joined
}

// touches reports whether b is a plain text or a colon that follows the plain text or colon a without a gap.
func touches(a, b *token.Token) bool {
	plain := func(t *token.Token) bool {
		return t.Type == token.MappingValueType || t.CharacterType == token.CharacterTypeMiscellaneous
	}
	return plain(a) && plain(b) && a.Position.Line == b.Position.Line &&
		b.Position.Column == a.Position.Column+utf8.RuneCountInString(a.Value)
}

func secondDocument(tk *token.Token) *fault {
	return &fault{token: tk, message: "a second document begins here", next: "keep one document in a file"}
}

// refused are the tokens that no file of Culvert needs.
var refused = map[token.Type]*fault{
	token.AnchorType:    {message: "anchors (&) are not supported", next: "write the value out where it is needed"},
	token.AliasType:     {message: "aliases (*) are not supported", next: "write the value out, or quote a text that begins with *"},
	token.MergeKeyType:  {message: "merge keys (<<) are not supported", next: "write the keys out where they are needed"},
	token.TagType:       {message: "tags (!) are not supported", next: "remove the tag, or quote a text that begins with !"},
	token.DirectiveType: {message: "directives (%) are not supported", next: "remove this line"},
}

// screen looks through the tokens before anything recurses over them.
func screen(tokens token.Tokens) *fault {
	var s screening
	for _, tk := range tokens {
		if tk.Type == token.CommentType {
			continue
		}
		if r, ok := refused[tk.Type]; ok {
			return &fault{token: tk, message: r.message, next: r.next}
		}
		if f := s.documents(tk); f != nil {
			return f
		}
		if s.tooDeep(tk) {
			return &fault{token: tk, message: "values are nested too deeply here", next: "flatten the file"}
		}
	}
	return nil
}

type screening struct {
	content bool // something of the document has been seen
	header  bool // "---" has been seen
	ended   bool // "..." has been seen
	flow    int  // open [ and {
}

func (s *screening) documents(tk *token.Token) *fault {
	switch {
	case tk.Type == token.DocumentEndType:
		s.ended = true
	case s.ended, tk.Type == token.DocumentHeaderType && (s.content || s.header):
		return secondDocument(tk)
	case tk.Type == token.DocumentHeaderType:
		s.header = true
	default:
		s.content = true
	}
	return nil
}

func (s *screening) tooDeep(tk *token.Token) bool {
	switch tk.Type {
	case token.SequenceStartType, token.MappingStartType:
		s.flow++
		return s.flow > maxFlowDepth
	case token.SequenceEndType, token.MappingEndType:
		s.flow--
	case token.SequenceEntryType, token.MappingKeyType:
		return tk.Position.Column > maxBlockColumn
	}
	return false
}
